"""Random FLUX.1 weights in checkpoint layout, the same in every process that makes them from the same seed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from xditd.gpu_workers.families.flux1.checkpoint import Flux1, Flux1Config


@dataclass(frozen=True)
class Size:
    """How large a transformer is made; the default is FLUX.1-dev with 11.9 B parameters."""

    hidden: int = 3072
    double_blocks: int = 19
    single_blocks: int = 38


FULL = Size()
SMALL = Size(hidden=256, double_blocks=2, single_blocks=2)


def shapes(size: Size, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a dev checkpoint of this size."""
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
    """Fill tensors in place. Each has a generator of its own, so order and selection do not matter."""
    for name, tensor in tensors.items():
        generator = torch.Generator(tensor.device).manual_seed(seed + zlib.crc32(name.encode()))
        if tensor.ndim > 1:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        elif "_norm." in name:
            tensor.normal_(1.0, 0.1, generator=generator)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)


def state_dict(size: Size, dtype: torch.dtype, device: str, seed: int) -> dict[str, torch.Tensor]:
    """Make a whole checkpoint on a device."""
    tensors = {
        name: torch.empty(shape, dtype=kind, device=device) for name, (kind, shape) in shapes(size, dtype).items()
    }
    fill(tensors, seed)
    return tensors
