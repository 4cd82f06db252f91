"""JoyImage-Edit and Edit Plus: image and text tokens joined in every attention."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

_TOKENS: Final[dict[str | int, Split]] = {"hidden_states": Split("image"), "encoder_hidden_states": Split("text")}
_JOINT: Final = Attention(queries=("image", "text"), keys=("image", "text"))

EDIT: Final = TokenPlan(
    # With rotary embeddings of the text as well, which have its number of tokens, a call is refused.
    splits={"double_blocks.0": _TOKENS, "double_blocks.*": {"image_rotary_emb": Split("image", dim=0)}},
    gathers={"proj_out": {0: Split("image")}},
    attentions={"double_blocks.*.attn": _JOINT},
)

EDIT_PLUS: Final = TokenPlan(
    # The mask is one of all keys, image and text.
    splits={"double_blocks.0": _TOKENS, "double_blocks.*": {"image_rotary_emb": Split("image")}},
    gathers={"proj_out": {0: Split("image")}},
    attentions={"double_blocks.*.attn": _JOINT},
)

PLANS: Final = {"JoyImageEditTransformer3DModel": EDIT, "JoyImageEditPlusTransformer3DModel": EDIT_PLUS}
