"""CogView3 Plus, CogView4 and GLM-Image: streams of text and of image tokens, joined in every attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from xditd.gpu_workers.models.token_plans import Attention, Cache, CachedTokens, Split, TokenPlan, is_given

_JOINT: Final = Attention(queries=("text", "image"), keys=("text", "image"))


def _is_read(given: Mapping[str, Any]) -> bool:
    return any(each.mode == "read" for each in given["kv_caches"].caches)


COG_VIEW_3_PLUS: Final = TokenPlan(
    splits={"transformer_blocks.0": {"hidden_states": Split("image"), "encoder_hidden_states": Split("text")}},
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn1": _JOINT},
)

COG_VIEW_4: Final = TokenPlan(
    splits={
        "patch_embed": {0: Split("image"), 1: Split("text")},
        "transformer_blocks.*": {"image_rotary_emb": Split("image", dim=0)},
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn1": _JOINT},
    # Every attention makes its mask of the lengths of this rank. No pipeline gives one.
    refused={"attention_mask": is_given},
)

_CACHED: Final = CachedTokens(read="cached", written=("text", "image"))

GLM_IMAGE: Final = TokenPlan(
    splits={
        "": {"encoder_hidden_states": Split("text")},
        "image_projector": {0: Split("image")},
        # Behind the tokens to drop, which may be given for each row. An image to edit has no dimension of rows.
        "prior_projector": {0: Split("image", dim=-2)},
        "transformer_blocks.*": {"image_rotary_emb": Split("image", dim=0)},
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn1": Attention(queries=("text", "image"), keys=("cached", "text", "image"))},
    # Every attention makes its mask of the lengths of this rank. No pipeline gives one.
    refused={"attention_mask": is_given},
    # A call for each image to edit puts its tokens there, after those of the images before it.
    cache=Cache("kv_caches", tensors={"k_caches": _CACHED, "v_caches": _CACHED}, is_read=_is_read),
)

PLANS: Final = {
    "CogView3PlusTransformer2DModel": COG_VIEW_3_PLUS,
    "CogView4Transformer2DModel": COG_VIEW_4,
    "GlmImageTransformer2DModel": GLM_IMAGE,
}
