"""The sizes of the VAE of Wan 2.1 and Qwen-Image, and the constants of both.

Source: diffusers, ``autoencoder_kl_qwenimage.py``, whose defaults are those of the released VAEs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xditd.ipc.facts import LatentScaling

SCALING: Final = LatentScaling(factor=1.0, shift=0.0)
"""Latents in jobs are ``(z - mean) / deviation`` of each channel."""

MEANS: Final = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
DEVIATIONS: Final = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

LATENT_CHANNELS: Final = 16
IMAGE_CHANNELS: Final = 3
WIDTHS: Final = (1, 2, 4, 4)
"""Of each level, from the full resolution down, in multiples of the first."""
RESIDUALS: Final = 2
IN_TIME: Final = (False, True, True)
"""Whether a level's encoder halves the number of frames, too; its decoder doubles them in the reverse order."""
PIXELS_PER_LATENT: Final = 8
FRAMES_PER_LATENT: Final = 4
"""Of a video, for each latent frame after the first."""


@dataclass(frozen=True, slots=True)
class WanVaeConfig:
    """The sizes of a VAE: ``width`` is that of the full resolution, 96 in released ones."""

    width: int
    has_encoder: bool = True
