"""The sizes of the VAEs of Wan 2.1, Qwen-Image and Wan 2.2 TI2V, and their constants.

Sources: diffusers, ``autoencoder_kl_wan.py``, whose defaults are those of Wan 2.1, and the ``config.json`` beside the
VAE of Wan 2.2 TI2V 5B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xditd.ipc.facts import LatentScaling

SCALING: Final = LatentScaling(factor=1.0, shift=0.0)
"""Latents in jobs are ``(z - mean) / deviation`` of each channel."""

IMAGE_CHANNELS: Final = 3
WIDTHS: Final = (1, 2, 4, 4)
"""Of each level, from the full resolution down, in multiples of the first."""
RESIDUALS: Final = 2
IN_TIME: Final = (False, True, True)
"""Whether a level's encoder halves the number of frames, too; its decoder doubles them in the reverse order."""
FRAMES_PER_LATENT: Final = 4
"""Of a video, for each latent frame after the first."""


@dataclass(frozen=True, slots=True)
class Release:
    """What the VAEs of one release have in common.

    ``space`` names that of the latents. ``patch`` x ``patch`` pixels are the channels of one at the full resolution.
    ``has_averages``: each level adds the average of its input to its result, or repeats of it.
    """

    space: str
    pixels: int
    patch: int
    has_averages: bool
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Of latents."""
        return len(self.means)

    @property
    def planes(self) -> int:
        """Of an image, with its patches as channels."""
        return IMAGE_CHANNELS * self.patch**2


WAN_2_1: Final = Release(
    space="wan_2_1",
    pixels=8,
    patch=1,
    has_averages=False,
    means=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    deviations=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)  # fmt: skip
"""Qwen-Image's, too."""

WAN_2_2: Final = Release(
    space="wan_2_2",
    pixels=16,
    patch=2,
    has_averages=True,
    means=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    deviations=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)  # fmt: skip
"""That of TI2V 5B; Wan 2.2's A14B transformers take Wan 2.1's."""


@dataclass(frozen=True, slots=True)
class WanVaeConfig:
    """The sizes of a VAE: ``width`` is the decoder's at the full resolution, ``encoder_width`` the encoder's.

    Released ones have 96 and 96, that of Wan 2.2 has 256 and 160. Without an encoder its width is the decoder's.
    """

    width: int
    has_encoder: bool = True
    is_wan_2_2: bool = False
    encoder_width: int = 0
    """0: as ``width``."""

    @property
    def release(self) -> Release:
        return WAN_2_2 if self.is_wan_2_2 else WAN_2_1
