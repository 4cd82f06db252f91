"""FLUX.1 and FLUX.2: text and image tokens are joined in every attention, in this order."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan, is_given

_JOINT: Final = Attention(queries=("text", "image"), keys=("text", "image"))

FLUX: Final = TokenPlan(
    splits={
        "": {
            "hidden_states": Split("image"),
            "encoder_hidden_states": Split("text"),
            "img_ids": Split("image", dim=-2),
            "txt_ids": Split("text", dim=-2),
            "controlnet_block_samples": Split("image"),
            "controlnet_single_block_samples": Split("image"),
        }
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={
        # The second is that of IP adapters: from the image and text tokens to those of the image prompts.
        "transformer_blocks.*.attn": Attention(
            queries=("text", "image"),
            keys=("text", "image"),
            others=(Attention(queries=("image",), keys=()),),
        ),
        "single_transformer_blocks.*.attn": _JOINT,
    },
)

FLUX_2: Final = TokenPlan(
    splits={
        "": {
            "hidden_states": Split("image"),
            "encoder_hidden_states": Split("text"),
            "img_ids": Split("image", dim=-2),
            "txt_ids": Split("text", dim=-2),
        }
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn": _JOINT, "single_transformer_blocks.*.attn": _JOINT},
    # Reference tokens before the image's attend among themselves alone, or are in the cache alone.
    refused={"kv_cache": is_given, "kv_cache_mode": is_given},
)

PLANS: Final = {"FluxTransformer2DModel": FLUX, "Flux2Transformer2DModel": FLUX_2}
