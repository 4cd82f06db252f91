"""The shape of FLUX.1's VAE, and what all of them have in common."""

from __future__ import annotations

from dataclasses import dataclass

SCALING = 0.3611
SHIFT = 0.1159
"""Latents for the transformer are ``(z - SHIFT) * SCALING``."""

LATENT_CHANNELS = 16
IMAGE_CHANNELS = 3
NORM_GROUPS = 32
LEVELS = 4
PIXELS_PER_LATENT = 2 ** (LEVELS - 1)


@dataclass(frozen=True, slots=True)
class FluxVaeConfig:
    """The shape of a VAE; ``channels`` from the full resolution down, ``residuals`` per level of the encoder."""

    channels: tuple[int, ...]
    residuals: int
    has_mid_attention: bool
    has_encoder: bool
