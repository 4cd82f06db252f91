"""The sizes of a Z-Image transformer, and the constants of all of them.

Numbers that are not in the tensors are those of the released models. Sources: diffusers, ``transformer_z_image.py``,
and the ``config.json`` and ``scheduler_config.json`` beside the weights of Z-Image-Turbo and Z-Image.
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
"""Pixels per latent on each side, by its VAE, which is FLUX.1's."""
PATCH_CHANNELS = LATENT_CHANNELS * PATCH * PATCH
TOKENS_MULTIPLE = 32
"""Text and image are padded to multiples of it with learned tokens, which are attended to."""
TIMESTEP_CHANNELS = 256
TIME_HIDDEN = 1024
MAX_TIME_CHANNELS = 256
MAX_TEXT_TOKENS = AXES_LENGTHS[0] - TOKENS_MULTIPLE
"""On the first axis the image comes after the padded text."""

TURBO_SHIFT = 3.0
BASE_SHIFT = 6.0
"""The schedule shifts of the released scheduler configurations; neither depends on the size of the image."""


@dataclass(frozen=True, slots=True)
class ZImageConfig:
    """The sizes of a Z-Image transformer: ``refiners`` blocks each for text and for image, then ``layers`` for both.

    Turbo and Base have the same sizes; they differ in the values of their weights and in sampling.
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
    """Return the padded number of tokens of a text or an image."""
    return tokens + -tokens % TOKENS_MULTIPLE
