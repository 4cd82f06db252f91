"""The relatives of FLUX.1: Chroma, Bria 3.2, FIBO, LongCat-Image and Ovis-Image have its streams in its order."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan, is_given

_JOINT: Final = Attention(queries=("text", "image"), keys=("text", "image"))

_TOKENS: Final[dict[str | int, Split]] = {
    "hidden_states": Split("image"),
    "encoder_hidden_states": Split("text"),
    "img_ids": Split("image", dim=-2),
    "txt_ids": Split("text", dim=-2),
}

CHROMA: Final = TokenPlan(
    splits={
        # Not the mask: every block makes one of all queries and all keys of that of the whole sequence.
        "": _TOKENS
        | {
            "controlnet_block_samples": Split("image"),
            "controlnet_single_block_samples": Split("image"),
        }
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={
        # The second is that of IP adapters: from the image tokens to those of the image prompts.
        "transformer_blocks.*.attn": Attention(
            queries=("text", "image"),
            keys=("text", "image"),
            others=(Attention(queries=("image",), keys=()),),
        ),
        "single_transformer_blocks.*.attn": _JOINT,
    },
)

BRIA: Final = TokenPlan(
    splits={"": _TOKENS | {"controlnet_block_samples": Split("image")}},
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn": _JOINT, "single_transformer_blocks.*.attn": _JOINT},
    # The class adds these to the image's tokens from the number of the text's tokens on.
    refused={"controlnet_single_block_samples": is_given},
)

FIBO: Final = TokenPlan(
    # The mask is one of all queries and all keys, and stays whole.
    splits={"": _TOKENS | {"text_encoder_layers": Split("text")}},
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn": _JOINT, "single_transformer_blocks.*.attn": _JOINT},
)

WITHOUT_MORE: Final = TokenPlan(
    splits={"": _TOKENS},
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn": _JOINT, "single_transformer_blocks.*.attn": _JOINT},
)

PLANS: Final = {
    "ChromaTransformer2DModel": CHROMA,
    "BriaTransformer2DModel": BRIA,
    "BriaFiboTransformer2DModel": FIBO,
    "LongCatImageTransformer2DModel": WITHOUT_MORE,
    "OvisImageTransformer2DModel": WITHOUT_MORE,
}
