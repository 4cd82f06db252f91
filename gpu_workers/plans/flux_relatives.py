"""The relatives of FLUX.1: Chroma, Bria 3.2, FIBO, LongCat-Image and Ovis-Image have its streams in its order."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Split, TokenPlan, is_given
from xditd.gpu_workers.plans.flux import GATHERED, JOINT, JOINT_WITH_ADAPTERS, RESIDUALS, TOKENS

CHROMA: Final = TokenPlan(
    # Not the mask: every block makes one of all queries and all keys of that of the whole sequence.
    splits={"": TOKENS | RESIDUALS},
    gathers=GATHERED,
    attentions=JOINT_WITH_ADAPTERS,
)

BRIA: Final = TokenPlan(
    splits={"": TOKENS | {"controlnet_block_samples": Split("image")}},
    gathers=GATHERED,
    attentions=JOINT,
    # The class adds these to the image's tokens from the number of the text's tokens on.
    refused={"controlnet_single_block_samples": is_given},
)

FIBO: Final = TokenPlan(
    # The mask is one of all queries and all keys, and stays whole.
    splits={"": TOKENS | {"text_encoder_layers": Split("text")}},
    gathers=GATHERED,
    attentions=JOINT,
)

WITHOUT_MORE: Final = TokenPlan(splits={"": TOKENS}, gathers=GATHERED, attentions=JOINT)

PLANS: Final = {
    "ChromaTransformer2DModel": CHROMA,
    "BriaTransformer2DModel": BRIA,
    "BriaFiboTransformer2DModel": FIBO,
    "LongCatImageTransformer2DModel": WITHOUT_MORE,
    "OvisImageTransformer2DModel": WITHOUT_MORE,
}
