"""Helpers for adapters: join kept rows into one argument, pad latents to whole patches, and pack these into tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xditd.client.jobs.arguments import RowsOf

if TYPE_CHECKING:
    import torch

    from xditd.client.jobs.arguments import KeptTensor


def join_rows(kept: Sequence[KeptTensor]) -> KeptTensor | RowsOf:
    """Join rows along dimension 0; equal neighbours are sent once, with their number."""
    runs = [(row, len(list(same))) for row, same in itertools.groupby(kept, key=lambda each: each)]
    return runs[0][0] if len(runs) == 1 and runs[0][1] == 1 else RowsOf(runs)


def join_several(kept: Sequence[KeptTensor]) -> KeptTensor | RowsOf:
    """Join what has several rows each along dimension 0; ``RowsOf`` would repeat each row by itself."""
    return kept[0] if len(kept) == 1 else RowsOf([(each, 1) for each in kept])


def pad_to_patch(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Pad latents (rows, channels, height, width) to a height and width that ``patch`` divides, as ComfyUI does."""
    if x.shape[2] % patch == 0 == x.shape[3] % patch:
        return x
    import comfy.ldm.common_dit

    result: torch.Tensor = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
    return result


def pack_patches(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Pack (rows, channels, height, width) into tokens, (rows, tokens, channels * patch * patch), contiguous."""
    rows, channels, height, width = latents.shape
    split = latents.reshape(rows, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(rows, height * width // patch**2, channels * patch**2)


def unpack_patches(tokens: torch.Tensor, height: int, width: int, patch: int) -> torch.Tensor:
    """Unpack the tokens of :func:`pack_patches` to (rows, channels, height, width)."""
    rows, _, channels = tokens.shape
    split = tokens.reshape(rows, height // patch, width // patch, channels // patch**2, patch, patch)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // patch**2, height, width)
