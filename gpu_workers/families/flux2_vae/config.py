"""The sizes of FLUX.2's VAE, and the constants of all of them.

Sources: diffusers, ``autoencoder_kl_flux2.py``; the ``config.json`` beside the weights of FLUX.2-dev.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xditd.ipc.facts import LatentScaling

Z_CHANNELS: Final = 32
PATCH: Final = 2
LATENT_CHANNELS: Final = Z_CHANNELS * PATCH * PATCH
"""Of the latents of jobs: patches of 2x2, normalised by the statistics in the file."""
LEVELS: Final = 4
PIXELS_PER_LATENT: Final = 2 ** (LEVELS - 1) * PATCH
EPSILON: Final = 1e-4
"""Added to the variances of the statistics."""

SCALING: Final = LatentScaling(factor=1.0, shift=0.0)
SPACE: Final = "flux2"
"""The latent space of FLUX.2."""


@dataclass(frozen=True, slots=True)
class Flux2VaeConfig:
    """The sizes of a VAE: channels from the full resolution down, ``residuals`` per level of the encoder.

    ``encoder_channels`` are empty for a decoder alone. ``has_linear_attention``: projections of its attentions are
    matrices, as in files with diffusers' naming, and not 1x1 convolutions.
    """

    channels: tuple[int, ...]
    encoder_channels: tuple[int, ...]
    residuals: int
    has_quant_conv: bool
    has_linear_attention: bool = False

    @property
    def has_encoder(self) -> bool:
        return bool(self.encoder_channels)
