"""The sizes of FLUX.1's VAE, and the constants of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xditd.ipc.facts import LatentScaling

SCALING: Final = LatentScaling(factor=0.3611, shift=0.1159)
"""Of FLUX.1 and Z-Image: the default of jobs without a scaling."""

SPACE: Final = "flux1"
"""The latent space of FLUX.1 and Z-Image. VAEs with the same tensors in other spaces, such as SD3's, are not told
apart."""

LATENT_CHANNELS = 16
LEVELS = 4
PIXELS_PER_LATENT = 2 ** (LEVELS - 1)


@dataclass(frozen=True, slots=True)
class FluxVaeConfig:
    """The sizes of a VAE: ``channels`` from the full resolution down, ``residuals`` per level of the encoder."""

    channels: tuple[int, ...]
    residuals: int
    has_mid_attention: bool
    has_encoder: bool
    has_linear_attention: bool = False
    """Projections of its attentions are matrices, as in files with diffusers' naming, and not 1x1 convolutions."""
