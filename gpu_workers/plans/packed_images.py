"""ERNIE-Image, Ideogram 4 and OmniGen: one sequence of text and image tokens in all blocks."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

_JOINT: Final = Attention(queries=("joint",), keys=("joint",))

ERNIE_IMAGE: Final = TokenPlan(
    splits={
        # Tokens come first in the blocks: (tokens, batch, channels). The modulation has one entry for each token.
        "layers.0": {"x": Split("joint", dim=0)},
        "layers.*": {"rotary_pos_emb": Split("joint"), "temb": Split("joint", dim=0)},
    },
    gathers={"final_linear": {0: Split("joint", dim=0)}},
    attentions={"layers.*.self_attention": _JOINT},
)

IDEOGRAM_4: Final = TokenPlan(
    splits={
        # Not the segments: the mask of all queries and all keys is made of them.
        "": {
            "hidden_states": Split("joint"),
            "encoder_hidden_states": Split("joint"),
            "position_ids": Split("joint"),
            "indicator": Split("joint"),
            # A time for each token.
            "timestep": Split("joint", ndim=2),
        }
    },
    gathers={"final_layer": {0: Split("joint")}},
    attentions={"layers.*.attention": _JOINT},
)

OMNI_GEN: Final = TokenPlan(
    splits={
        "rope": {0: Split("joint", dim=0), 1: Split("joint", dim=0)},
        "layers.0": {"hidden_states": Split("joint")},
    },
    # Before the class takes the image's tokens by their number.
    gathers={"norm": {0: Split("joint")}},
    attentions={"layers.*.self_attn": _JOINT},
)

PLANS: Final = {
    "ErnieImageTransformer2DModel": ERNIE_IMAGE,
    "Ideogram4Transformer2DModel": IDEOGRAM_4,
    "OmniGenTransformer2DModel": OMNI_GEN,
}
