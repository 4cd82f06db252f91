"""FLUX.1 and FLUX.2: text and image tokens are joined in every attention, in this order."""

from __future__ import annotations

from typing import Any, Final

from xditd.gpu_workers.models.token_plans import Attention, Cache, CachedTokens, Length, Split, TokenPlan, is_given

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


def _has_pixels(picture: Any) -> bool:
    """Return whether a ControlNet makes tokens of a picture itself, (rows, 3, height, width)."""
    return bool(picture.ndim == 4)


# A mode becomes a token of the text inside the forward, on every rank.
FLUX_CONTROLNET: Final = TokenPlan(
    splits={"": TOKENS | {"controlnet_cond": Split("image")}},
    gathers={name: {0: Split("image")} for name in ("controlnet_blocks.*", "controlnet_single_blocks.*")},
    attentions=JOINT,
    optional=("single_transformer_blocks.*.attn", "controlnet_single_blocks.*"),
    refused={"controlnet_mode": is_given, "controlnet_cond": _has_pixels},
)

# The text and the image attend to all, also to reference tokens: of the call, which then attend to each other alone, or
# in the cache.
_WITH_REFERENCES: Final = Attention(
    queries=("text", "image"),
    keys=("text", "reference", "image"),
    others=(Attention(queries=("reference",), keys=("reference",)),),
)
_REFERENCES: Final = CachedTokens(read="reference", written=("reference",))

FLUX_2: Final = TokenPlan(
    splits={
        "": {
            "num_ref_tokens": Length("reference"),
            **TOKENS,
            "hidden_states": Split("image", after="reference"),
            "img_ids": Split("image", dim=-2, after="reference"),
        }
    },
    gathers=GATHERED,
    attentions={"transformer_blocks.*.attn": _WITH_REFERENCES, "single_transformer_blocks.*.attn": _WITH_REFERENCES},
    cache=Cache(
        "kv_cache",
        tensors={"k_ref": _REFERENCES, "v_ref": _REFERENCES},
        is_read=lambda given: given.get("kv_cache_mode") == "cached",
        is_made=lambda given: given.get("kv_cache_mode") == "extract",
        counts={"num_ref_tokens": "reference"},
    ),
)

PLANS: Final = {
    "FluxTransformer2DModel": FLUX,
    "FluxControlNetModel": FLUX_CONTROLNET,
    "Flux2Transformer2DModel": FLUX_2,
}
