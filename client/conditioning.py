"""Text conditioning for jobs: read from a file, or random of the widths that a checkpoint takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from xditd.client.tensor_files import read_shapes, read_tensors
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    import torch

EMBEDS: Final = "prompt_embeds"
POOLED: Final = "pooled_prompt_embeds"


def read_conditioning(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read ``prompt_embeds`` and ``pooled_prompt_embeds``; a missing batch axis is put in front.

    Raises:
        BadCheckpoint: the file is no sound safetensors file.
        BadRequest: it lacks one of the two.
    """
    tensors = read_tensors(path)
    missing = [name for name in (EMBEDS, POOLED) if name not in tensors]
    if missing:
        there = ", ".join(tensors) or "no tensors"
        raise BadRequest(f"{path}: lacks {' and '.join(missing)}; it holds {there}")
    embeds, pooled = tensors[EMBEDS], tensors[POOLED]
    return embeds[None] if embeds.ndim == 2 else embeds, pooled[None] if pooled.ndim == 1 else pooled


def random_conditioning(transformer: Path, seed: int, text_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw normal values of the widths that a FLUX.1 checkpoint takes: a test pattern, not a prompt.

    Raises:
        BadRequest: the widths cannot be told from the tensor names.
    """
    import torch

    context, pooled = conditioning_widths(transformer)
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, text_tokens, context, generator=generator)
    return embeds, torch.randn(1, pooled, generator=generator)


def conditioning_widths(transformer: Path) -> tuple[int, int]:
    """Tell context and pooled width by the layers that take them in, under any prefix."""
    shapes = read_shapes(transformer)
    widths = []
    for layer in ("txt_in.weight", "vector_in.in_layer.weight"):
        found = [shape for name, shape in shapes.items() if name == layer or name.endswith(f".{layer}")]
        if len(found) != 1 or len(found[0]) != 2:
            raise BadRequest(f"{transformer}: widths of the conditioning cannot be told (no {layer}); use --embeds")
        widths.append(found[0][1])
    return widths[0], widths[1]
