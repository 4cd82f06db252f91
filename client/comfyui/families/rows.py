"""Helpers for adapters: join kept rows into one argument, and pad latents to whole patches."""

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


def pad_to_patch(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Pad latents (rows, channels, height, width) to a height and width that ``patch`` divides, as ComfyUI does."""
    if x.shape[2] % patch == 0 == x.shape[3] % patch:
        return x
    import comfy.ldm.common_dit

    result: torch.Tensor = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
    return result
