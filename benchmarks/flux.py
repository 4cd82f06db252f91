"""Sizes and seeded random weights of the FLUX.1 transformer that parts run."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from xditd.gpu_workers.families.flux1.checkpoint import Flux1, Flux1Config


@dataclass(frozen=True)
class Size:
    """Size of a transformer; the default is FLUX.1-dev with 11.9 B parameters."""

    hidden: int = 3072
    double_blocks: int = 19
    single_blocks: int = 38


@dataclass(frozen=True)
class Scale:
    """Sizes of a job. ``steps`` is for timed jobs, ``parity_steps`` for jobs whose results are compared."""

    size: Size
    pixels: int
    tokens: int
    steps: int
    parity_steps: int
    vae_channels: tuple[int, ...]


FULL = Scale(Size(), 1024, 512, 28, 12, (128, 256, 512, 512))
SMALL = Scale(Size(hidden=256, double_blocks=2, single_blocks=2), 128, 16, 4, 4, (64, 64, 128, 128))
FLOOR_TFLOPS = 790.0
"""Measured rate of one H200 in a large bfloat16 matrix product of a few milliseconds."""


def scale_of(given: argparse.Namespace) -> Scale:
    return SMALL if given.small else FULL


def dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def device_of(given: argparse.Namespace, rank: int = 0) -> torch.device:
    return torch.device("cuda", rank) if given.device == "cuda" else torch.device("cpu")


def floor_ms(size: Size, pixels: int, text_tokens: int) -> float:
    """Return the least time of one step on one GPU: its matrix products at :data:`FLOOR_TFLOPS`."""
    tokens, blocks = (pixels // 16) ** 2 + text_tokens, size.double_blocks + size.single_blocks
    products, dots = blocks * 12 * size.hidden**2 * tokens, blocks * 2 * tokens * tokens * size.hidden
    return 2 * (products + dots) / (FLOOR_TFLOPS * 1e12) * 1e3


def shapes(size: Size, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a FLUX.1-dev checkpoint of this size, by name."""
    config = Flux1Config(
        hidden=size.hidden,
        double_blocks=size.double_blocks,
        single_blocks=size.single_blocks,
        context_channels=4096,
        pooled_channels=768,
        has_guidance=True,
    )
    return {entry.source: (dtype, entry.shape) for entry in Flux1().entries(config, ())}


def fill(tensors: Mapping[str, torch.Tensor], seed: int) -> None:
    """Fill tensors in place. Each has its own seed, so values do not depend on the order or on other tensors."""
    for name, tensor in tensors.items():
        generator = torch.Generator(tensor.device).manual_seed(seed + zlib.crc32(name.encode()))
        if tensor.ndim > 1:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        elif "_norm." in name:
            tensor.normal_(1.0, 0.1, generator=generator)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)


def state_dict(size: Size, dtype: torch.dtype, device: str | torch.device, seed: int) -> dict[str, torch.Tensor]:
    """Make a whole checkpoint on a device."""
    tensors = {
        name: torch.empty(shape, dtype=kind, device=device) for name, (kind, shape) in shapes(size, dtype).items()
    }
    fill(tensors, seed)
    return tensors
