"""Wan: the video's tokens attend to each other, and to the whole text, which is not split."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

WAN: Final = TokenPlan(
    splits={
        "rope": {0: Split("video"), 1: Split("video")},
        "blocks.0": {"hidden_states": Split("video")},
        # A time for each token, as in Wan 2.2 5B.
        "": {"timestep": Split("video", ndim=2)},
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={
        "blocks.*.attn1": Attention(queries=("video",), keys=("video",)),
        # The second is that to the tokens of a first image.
        "blocks.*.attn2": Attention(queries=("video",), keys=(), others=(Attention(queries=("video",), keys=()),)),
    },
)

PLANS: Final = {"WanTransformer3DModel": WAN}
