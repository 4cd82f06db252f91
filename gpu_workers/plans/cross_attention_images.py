"""PixArt, DiT, HunyuanDiT and PRX: image tokens attend to each other and to the text, which no layer changes."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan, is_given

_IMAGE: Final = Attention(queries=("image",), keys=("image",))
_TO_TEXT: Final = Attention(queries=("image",), keys=())

PIXART: Final = TokenPlan(
    splits={"pos_embed": {0: Split("image")}},
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn1": _IMAGE, "transformer_blocks.*.attn2": _TO_TEXT},
    # Every attention pads it to the length of this rank. No pipeline gives one.
    refused={"attention_mask": is_given},
)

DIT: Final = TokenPlan(
    splits={"pos_embed": {0: Split("image")}},
    gathers={"proj_out_2": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn1": _IMAGE},
)

HUNYUAN_DIT: Final = TokenPlan(
    splits={
        "pos_embed": {0: Split("image")},
        "": {"image_rotary_emb": Split("image", dim=0), "controlnet_block_samples": Split("image")},
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={"blocks.*.attn1": _IMAGE, "blocks.*.attn2": _TO_TEXT},
    whole=("time_extra_emb.pooler",),
)

PRX: Final = TokenPlan(
    splits={
        "blocks.0": {"hidden_states": Split("image")},
        # Keys of the text are put before those of the image, in one attention.
        "txt_in": {0: Split("text")},
        "blocks.*": {"image_rotary_emb": Split("image", dim=2), "attention_mask": Split("text")},
    },
    gathers={"final_layer": {0: Split("image")}},
    attentions={"blocks.*.attention": Attention(queries=("image",), keys=("text", "image"))},
)

PLANS: Final = {
    "PixArtTransformer2DModel": PIXART,
    "DiTTransformer2DModel": DIT,
    "HunyuanDiT2DModel": HUNYUAN_DIT,
    "PRXTransformer2DModel": PRX,
}
