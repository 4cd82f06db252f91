"""FLUX.1 and FLUX.2: text and image tokens are joined in every attention, in this order."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan, is_given

_JOINT: Final = Attention(queries=("text", "image"), keys=("text", "image"))

TOKENS: Final[dict[str | int, Split]] = {
    "hidden_states": Split("image"),
    "encoder_hidden_states": Split("text"),
    "img_ids": Split("image", dim=-2),
    "txt_ids": Split("text", dim=-2),
}

RESIDUALS: Final[dict[str | int, Split]] = {
    "controlnet_block_samples": Split("image"),
    "controlnet_single_block_samples": Split("image"),
}

GATHERED: Final = {"proj_out": {0: Split("image")}}

JOINT: Final = {"transformer_blocks.*.attn": _JOINT, "single_transformer_blocks.*.attn": _JOINT}

# The second is that of IP adapters: from the image tokens to those of the image prompts.
JOINT_WITH_ADAPTERS: Final = JOINT | {
    "transformer_blocks.*.attn": Attention(
        queries=("text", "image"),
        keys=("text", "image"),
        others=(Attention(queries=("image",), keys=()),),
    )
}

FLUX: Final = TokenPlan(splits={"": TOKENS | RESIDUALS}, gathers=GATHERED, attentions=JOINT_WITH_ADAPTERS)

FLUX_2: Final = TokenPlan(
    splits={"": TOKENS},
    gathers=GATHERED,
    attentions=JOINT,
    # Reference tokens before the image's attend among themselves alone, or are in the cache alone.
    refused={"kv_cache": is_given, "kv_cache_mode": is_given},
)

PLANS: Final = {"FluxTransformer2DModel": FLUX, "Flux2Transformer2DModel": FLUX_2}
