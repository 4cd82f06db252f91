"""FLUX.3: text, image and reference tokens attend apart in the first blocks, and joined in the others."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

_JOINT: Final = ("text", "image", "reference")

FLUX_3: Final = TokenPlan(
    splits={
        "": {
            "hidden_states": Split("image"),
            "encoder_hidden_states": Split("text"),
            "image_cond_hidden_states": Split("reference"),
            "img_ids": Split("image", dim=0),
            "txt_ids": Split("text", dim=0),
            "image_cond_ids": Split("reference", dim=0),
        }
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={
        "txt_mode_blocks.*.attn": Attention(queries=("text",), keys=("text",)),
        "mode_blocks.image.*.attn": Attention(queries=("image",), keys=("image",)),
        "mode_blocks.image_cond.*.attn": Attention(queries=("reference",), keys=("reference",)),
        "single_transformer_blocks.*.attn": Attention(queries=_JOINT, keys=_JOINT),
    },
)

PLANS: Final = {"Flux3Transformer2DModel": FLUX_3}
