"""The sizes of a Qwen-Image transformer, and the constants of all of them.

Sources: diffusers, ``transformer_qwenimage.py`` and ``pipeline_qwenimage.py``, and the ``config.json`` and
``scheduler_config.json`` beside the weights of Qwen-Image and Qwen-Image-Edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

HEAD_SIZE: Final = 128
AXES: Final = (16, 56, 56)
"""Channels of a head that are rotated by image, row and column."""
ROPE_THETA: Final = 10000
POSITIONS: Final = 4096
"""Positions on each axis: a text's tokens come after half of the longest side of the images."""
MLP_RATIO: Final = 4
TIMESTEP_CHANNELS: Final = 256
MODULATIONS: Final = 6

PATCH: Final = 2
LATENT_CHANNELS: Final = 16
PACKED_CHANNELS: Final = LATENT_CHANNELS * PATCH * PATCH
PIXELS_PER_LATENT: Final = 8

SCHEDULER: Final[Mapping[str, Any]] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


@dataclass(frozen=True, slots=True)
class QwenImageConfig:
    """The sizes of a Qwen-Image transformer; the released ones have 60 blocks of 24 heads, and texts of 3584 channels.

    ``has_marker``: the checkpoint has ComfyUI's marker of Edit-2511, whose references are modulated at timestep zero.
    ``zero_cond_t``: the ``config.json`` beside files of diffusers, which do not show it, says so.
    """

    hidden: int
    blocks: int
    text_channels: int
    has_marker: bool = False
    zero_cond_t: bool = False

    @property
    def has_references_at_zero(self) -> bool:
        """Whether every variant modulates references at timestep zero."""
        return self.has_marker or self.zero_cond_t

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_SIZE

    @property
    def mlp(self) -> int:
        return MLP_RATIO * self.hidden
