"""Qwen-Image: text and image tokens are joined in every attention, with a mask of the text's padding."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

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

PLANS: Final = {"QwenImageTransformer2DModel": QWEN_IMAGE}
