"""The shape of a Z-Image transformer, and what all of them have in common.

Numbers that no tensor shows are those of the released models. Sources: diffusers, ``transformer_z_image.py``, and the
``config.json`` and ``scheduler_config.json`` beside the weights of Z-Image-Turbo and Z-Image.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_SIZE = 128
AXES = (32, 48, 48)
"""Channels of a head that are rotated by time, row and column."""
AXES_LENGTHS = (1536, 512, 512)
"""Positions on each axis: text and then the image, rows of patches, columns of patches."""
ROPE_THETA = 256.0
NORM_EPSILON = 1e-5
TIME_SCALE = 1000.0

PATCH = 2
LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8
"""On a side: what its VAE, FLUX.1's, makes of one."""
PATCH_CHANNELS = LATENT_CHANNELS * PATCH * PATCH
TOKENS_MULTIPLE = 32
"""Text and image are padded to multiples of it, each with a token of its own that is attended to."""
TIMESTEP_CHANNELS = 256
TIME_HIDDEN = 1024
MAX_TIME_CHANNELS = 256
MAX_TEXT_TOKENS = AXES_LENGTHS[0] - TOKENS_MULTIPLE
"""The image lies behind the padded text on the first axis."""

TURBO_SHIFT = 3.0
BASE_SHIFT = 6.0
"""Of the schedule, in the released scheduler configurations; neither shifts by the size of the image."""


@dataclass(frozen=True, slots=True)
class ZImageConfig:
    """The shape of a Z-Image transformer: blocks of text and of image alone (``refiners`` each), then of both.

    Nothing in it tells Turbo from Base: they differ in the values of their weights, and in how they are sampled.
    """

    hidden: int
    layers: int
    refiners: int
    text_channels: int

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_SIZE

    @property
    def mlp(self) -> int:
        return int(self.hidden / 3 * 8)  # diffusers' own expression, for the same rounding

    @property
    def time_channels(self) -> int:
        return min(self.hidden, MAX_TIME_CHANNELS)


def padded(tokens: int) -> int:
    """Return how many tokens a text or an image of ``tokens`` takes in a sequence."""
    return tokens + -tokens % TOKENS_MULTIPLE
