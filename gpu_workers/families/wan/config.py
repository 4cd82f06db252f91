"""The sizes of a Wan transformer, and the constants of all of them.

Sources: diffusers, ``transformer_wan.py`` and ``pipeline_wan.py``, and the ``config.json`` beside the weights of
Wan 2.1 (1.3B, 14B) and Wan 2.2 (A14B, TI2V 5B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

HEAD_SIZE: Final = 128
PATCH: Final = (1, 2, 2)
"""Latents of a token: frames, rows, columns."""
EPSILON: Final = 1e-6
MODULATIONS: Final = 6
MOST_POSITIONS: Final = 1024
"""Tokens along an axis for which the class has a position."""
TEXT_TOKENS: Final = 512
"""Texts have as many in every pipeline, padded with zeros; models of image and text find the text by this number."""
IMAGE_TOKENS: Final = 257
"""Of a first image: those of CLIP's vision model, with the class token."""
FRAMES: Final = 4
"""Of a video, for each latent frame after the first."""
CONTROL_CHANNELS: Final = 96
"""Of VACE's control: 16 of what is kept, 16 of what is made anew, and 64 pixels of a mask for each latent."""
TIMESTEPS: Final = 1000
OUT_CHANNELS: Final[Mapping[int, int]] = {16: 16, 36: 16, 48: 48}
"""The channels of latents, by those of the input: 36 are 16 of noise, 4 of a mask and 16 of a first image; 48 are those
of TI2V's VAE."""


@dataclass(frozen=True, slots=True)
class WanConfig:
    """The sizes of a Wan transformer: 1.3B has 30 blocks of 1536 channels, 14B 40 of 5120, TI2V 5B 30 of 3072.

    ``image_channels`` are those of CLIP's vision model, which Wan 2.1 reads beside the text; 0 for models that do not.
    ``has_image_positions``: it was trained with a first and a last image, whose tokens have positions.
    ``is_original``: the names are those of the original and of ComfyUI's files, not diffusers'.
    """

    hidden: int
    blocks: int
    ffn: int
    in_channels: int = 16
    out_channels: int = 16
    text_channels: int = 4096
    time_channels: int = 256
    image_channels: int = 0
    has_image_positions: bool = False
    is_original: bool = True

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_SIZE

    @property
    def has_image_latents(self) -> bool:
        """Whether channels of its input are those of a first image, beside the noise."""
        return self.in_channels > self.out_channels

    @property
    def images(self) -> int:
        """The images of a row that CLIP's vision model has seen."""
        return 2 if self.has_image_positions else 1

    @property
    def has_time_per_token(self) -> bool:
        """Whether the pipeline gives it a time for each token: TI2V."""
        return self.out_channels == 48

    @property
    def default_shift(self) -> float:
        """That of the scheduler beside the released weights."""
        return 5.0 if self.has_time_per_token else 3.0

    @property
    def default_boundary(self) -> float:
        """The time, from 0 to 1, below which the second transformer of Wan 2.2 A14B predicts."""
        return 0.9 if self.has_image_latents else 0.875

    @property
    def pixels(self) -> int:
        """Pixels on a side for each latent: those of Wan 2.1's VAE, or of TI2V's."""
        return 16 if self.out_channels == 48 else 8


@dataclass(frozen=True, slots=True)
class WanVaceConfig(WanConfig):
    """The sizes of a Wan VACE transformer: 1.3B has 15 control blocks, 14B 8."""

    control_blocks: int = 1

    @property
    def control_layers(self) -> tuple[int, ...]:
        """The blocks after which the results of control blocks are added: every so many, from the first."""
        return tuple(range(0, self.blocks, self.blocks // self.control_blocks))
