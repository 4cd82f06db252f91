"""The sizes of Qwen2.5-VL, and the constants of all released ones that no tensor shows.

Source: the ``config.json`` beside the weights of Qwen2.5-VL-7B-Instruct.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HEAD_SIZE: Final = 128
ROPE_THETA: Final = 1e6
ROPE_SECTIONS: Final = (16, 24, 24)
EPSILON: Final = 1e-6

IMAGE_TOKEN: Final = 151655
"""``<|image_pad|>``: the place of one token of an image."""
VISION_HEAD_SIZE: Final = 80
CHANNELS: Final = 3
FRAMES: Final = 2
"""Frames of one patch, which are equal in an image."""
PATCH: Final = 14
MERGE: Final = 2
"""Patches on a side of one token."""
PATCH_VALUES: Final = CHANNELS * FRAMES * PATCH * PATCH
FULL_ATTENTION: Final = (7, 15, 23, 31)
"""The blocks in which patches see the whole image; those of others see windows."""
WINDOW: Final = 112
"""Pixels on a side of a window."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The sizes of a vision tower; ``inner`` is the MLP's width."""

    width: int
    blocks: int
    inner: int


@dataclass(frozen=True, slots=True)
class Qwen25VlConfig:
    """The sizes of a language model: ``heads`` of queries share ``key_heads`` of keys; ``inner`` is the MLP's width.

    ``vision`` are those of its vision tower, if the checkpoint has one.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vision: VisionConfig | None = None
