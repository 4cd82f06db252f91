"""Wan and the classes after it: the video's tokens attend to each other, and to the whole text, which is not split."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Count, Split, Splits, TokenPlan

_VIDEO: Final = Attention(queries=("video",), keys=("video",))
_TEXT: Final = Attention(
    # The second is that to the tokens of a first image.
    queries=("video",),
    keys=(),
    others=(Attention(queries=("video",), keys=()),),
)
_BLOCKS: Final = {"blocks.*.attn1": _VIDEO, "blocks.*.attn2": _TEXT}
_ROPE: Final[Splits] = {0: Split("video"), 1: Split("video")}

WAN: Final = TokenPlan(
    splits={
        "rope": _ROPE,
        "blocks.0": {"hidden_states": Split("video")},
        # A time for each token, as in Wan 2.2 5B.
        "": {"timestep": Split("video", ndim=2)},
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions=_BLOCKS,
)

CHRONO_EDIT: Final = TokenPlan(
    splits={"rope": _ROPE, "blocks.0": {"hidden_states": Split("video")}},
    gathers={"proj_out": {0: Split("video")}},
    attentions=_BLOCKS,
)

WAN_VACE: Final = TokenPlan(
    splits={
        "rope": _ROPE,
        # Only the first of these blocks reads the hidden states; the others continue the control's.
        "vace_blocks.0": {"hidden_states": Split("video"), "control_hidden_states": Split("video")},
        "blocks.0": {"hidden_states": Split("video")},
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={**_BLOCKS, "vace_blocks.*.attn1": _VIDEO, "vace_blocks.*.attn2": _TEXT},
)

WAN_ANIMATE: Final = TokenPlan(
    splits={
        "rope": _ROPE,
        "blocks.0": {"hidden_states": Split("video")},
        "face_adapter.*.to_out": {0: Split("video")},
    },
    gathers={
        # The tokens of each latent frame attend to those of the face in it: few keys, so that every rank computes
        # this for all queries.
        "face_adapter.*.norm_q": {0: Split("video")},
        "proj_out": {0: Split("video")},
    },
    attentions={**_BLOCKS, "face_adapter.*": Attention(queries=(), keys=())},
)

SKYREELS_V2: Final = TokenPlan(
    splits={
        "rope": _ROPE,
        "blocks.0": {"hidden_states": Split("video")},
        # With diffusion forcing each frame has its own time. A mask of blocks of frames is one of the whole sequence.
        "blocks.*": {"temb": Split("video", dim=2, ndim=4)},
    },
    # The time of each frame modulates the output norm's result.
    gathers={"blocks.-1": {0: Split("video")}},
    attentions=_BLOCKS,
)

HELIOS: Final = TokenPlan(
    splits={
        "blocks.0": {"hidden_states": Split("video")},
        "blocks.*": {
            "temb": Split("video"),
            "rotary_emb": Split("video"),
            # Tokens of earlier frames come first, and do not attend to the text.
            "original_context_length": Count("video", of_last=True),
        },
    },
    gathers={"blocks.-1": {0: Split("video")}},
    attentions={"blocks.*.attn1": _VIDEO, "blocks.*.attn2": Attention(queries=(), keys=())},
)

ANY_FLOW: Final = TokenPlan(
    splits={
        "rope": {0: Split("video", dim=2)},
        "blocks.0": {"hidden_states": Split("video")},
        "blocks.*": {"temb": Split("video")},
    },
    # The time of each frame modulates the output norm's result.
    gathers={"blocks.-1": {0: Split("video")}},
    attentions={"blocks.*.attn1": _VIDEO, "blocks.*.attn2": Attention(queries=("video",), keys=())},
)

PLANS: Final = {
    "WanTransformer3DModel": WAN,
    "ChronoEditTransformer3DModel": CHRONO_EDIT,
    "WanVACETransformer3DModel": WAN_VACE,
    "WanAnimateTransformer3DModel": WAN_ANIMATE,
    "SkyReelsV2Transformer3DModel": SKYREELS_V2,
    "HeliosTransformer3DModel": HELIOS,
    "AnyFlowTransformer3DModel": ANY_FLOW,
    "AnyFlowFARTransformer3DModel": (
        "a mask of blocks for flex attention, and caches that it fills in place in their order, fix the order of its "
        "tokens"
    ),
    "WanAnimate2Transformer3DModel": (
        "its attention is that of flex over a buffer of the whole video, with all heads, so that neither tokens nor "
        "heads of its cache can be split"
    ),
}
