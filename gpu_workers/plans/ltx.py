"""LTX: the video's tokens attend to each other and to the whole text; in LTX-2 also to those of the audio."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, Splits, TokenPlan

LTX: Final = TokenPlan(
    splits={
        "": {"hidden_states": Split("video"), "timestep": Split("video", ndim=2)},
        "rope": {0: Split("video"), 1: Split("video")},
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={
        "transformer_blocks.*.attn1": Attention(queries=("video",), keys=("video",)),
        "transformer_blocks.*.attn2": Attention(queries=("video",), keys=()),
    },
)

_VIDEO_ROPE: Final[Splits] = {0: Split("video", dim=-2), 1: Split("video", dim=-2)}
_AUDIO_ROPE: Final[Splits] = {0: Split("audio", dim=-2), 1: Split("audio", dim=-2)}

LTX_2: Final = TokenPlan(
    splits={
        "": {
            "hidden_states": Split("video"),
            "audio_hidden_states": Split("audio"),
            "timestep": Split("video", ndim=2),
            "audio_timestep": Split("audio", ndim=2),
            "video_keyframes_mask": Split("video"),
        },
        "rope": _VIDEO_ROPE,
        "cross_attn_rope": _VIDEO_ROPE,
        "audio_rope": _AUDIO_ROPE,
        "cross_attn_audio_rope": _AUDIO_ROPE,
        # The attention pads a mask that has another number of keys than it is given; the rows are all queries.
        "transformer_blocks.*": {"self_attention_mask": Split("video", dim=2)},
    },
    gathers={"proj_out": {0: Split("video")}, "audio_proj_out": {0: Split("audio")}},
    attentions={
        # Spatio-temporal guidance takes the values in place of these two.
        "transformer_blocks.*.attn1": Attention(queries=("video",), keys=("video",), may_skip=True),
        "transformer_blocks.*.audio_attn1": Attention(queries=("audio",), keys=("audio",), may_skip=True),
        "transformer_blocks.*.attn2": Attention(queries=("video",), keys=()),
        "transformer_blocks.*.audio_attn2": Attention(queries=("audio",), keys=()),
        "transformer_blocks.*.audio_to_video_attn": Attention(queries=("video",), keys=("audio",)),
        "transformer_blocks.*.video_to_audio_attn": Attention(queries=("audio",), keys=("video",)),
    },
)

PLANS: Final = {"LTXVideoTransformer3DModel": LTX, "LTX2VideoTransformer3DModel": LTX_2}
