"""HunyuanImage 2.1: image and text tokens joined in every attention, with a mask of the text's padding."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

_JOINT: Final = Attention(queries=("image", "text"), keys=("image", "text"))

HUNYUAN_IMAGE: Final = TokenPlan(
    splits={
        "rope": {0: Split("image", dim=0), 1: Split("image", dim=0)},
        # Behind the mask, which is made of whole lengths, and the order of the two texts by their masks.
        "transformer_blocks.0": {"hidden_states": Split("image"), "encoder_hidden_states": Split("text")},
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={"transformer_blocks.*.attn": _JOINT, "single_transformer_blocks.*.attn": _JOINT},
    whole=("context_embedder.token_refiner.refiner_blocks.*.attn",),
)

PLANS: Final = {"HunyuanImageTransformer2DModel": HUNYUAN_IMAGE}
