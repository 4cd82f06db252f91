"""Qwen-Image: text and image tokens are joined in every attention, with a mask of the text's padding.

Qwen-Image 2.1 has one sequence of text, reference and image tokens, with a causal mask of blocks.
"""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Cache, CachedHeads, Exchange, Split, TokenPlan

QWEN_IMAGE: Final = TokenPlan(
    splits={
        # The rotary embedding is computed from whole sequences, so the tokens are split behind it.
        "pos_embed": {0: Split("image", dim=0), 1: Split("text", dim=0)},
        "transformer_blocks.0": {"hidden_states": Split("image"), "encoder_hidden_states": Split("text")},
        "transformer_blocks.*": {
            "encoder_hidden_states_mask": Split("text"),
            "modulate_index": Split("image"),
        },
        "": {"controlnet_block_samples": Split("image")},
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn": Attention(queries=("text", "image"), keys=("text", "image"))},
)

QWEN_IMAGE_2_1: Final = TokenPlan(
    splits={
        "transformer_blocks.0": {"hidden_states": Split("joint")},
        "transformer_blocks.*": {"target_token_mask": Split("joint", dim=0)},
        "norm_out": {"target_token_mask": Split("joint", dim=0)},
    },
    gathers={"proj_out": {0: Split("joint")}},
    attentions={},
    # A block of tokens after the other attends to those before it. The rotary embedding and masks are of all tokens.
    exchanges={
        "transformer_blocks.*.attn": Exchange(
            "joint", inputs={"to_q": "heads", "to_k": "heads", "to_v": "heads"}, output="to_out.0"
        )
    },
    # The class's own code puts all tokens of this rank's heads there, and attends with these alone.
    cache=Cache("kv_cache", tensors={"k": CachedHeads("to_k"), "v": CachedHeads("to_v")}),
)

PLANS: Final = {"QwenImageTransformer2DModel": QWEN_IMAGE, "QwenImage21Transformer2DModel": QWEN_IMAGE_2_1}
