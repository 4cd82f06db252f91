"""How large everything is that the suite runs: FLUX.1-dev, or something small for two cores."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import flux_weights
import torch

FLOOR_TFLOPS = 790.0
"""What one H200 reaches in a large bfloat16 matrix product for a few milliseconds."""


@dataclass(frozen=True)
class Scale:
    """``steps`` are those of a job that is timed, ``parity_steps`` of one that is compared."""

    size: flux_weights.Size
    pixels: int
    tokens: int
    steps: int
    parity_steps: int
    vae_channels: tuple[int, ...]


FULL = Scale(flux_weights.FULL, 1024, 512, 28, 12, (128, 256, 512, 512))
SMALL = Scale(flux_weights.SMALL, 128, 16, 4, 4, (64, 64, 128, 128))


def named(given: argparse.Namespace) -> Scale:
    return SMALL if given.small else FULL


def dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def first_of(device: str) -> str:
    """The device of a process that uses one."""
    return "cuda:0" if device == "cuda" else "cpu"


def floor_ms(scale: Scale) -> float:
    """Multiplications of one step at :data:`FLOOR_TFLOPS`, on one GPU."""
    size = scale.size
    tokens = (scale.pixels // 16) ** 2 + scale.tokens
    products = (size.double_blocks * 12 + size.single_blocks * 12) * size.hidden * size.hidden * tokens
    dots = (size.double_blocks + size.single_blocks) * 2 * tokens * tokens * size.hidden
    return 2 * (products + dots) / (FLOOR_TFLOPS * 1e12) * 1e3
