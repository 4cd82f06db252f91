"""What adapters share: rows of a batch as one argument, and latents whose sides divide into patches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xditd.client.jobs.arguments import RowsOf

if TYPE_CHECKING:
    import torch

    from xditd.client.jobs.arguments import KeptTensor


def joined(kept: Sequence[KeptTensor]) -> KeptTensor | RowsOf:
    """Join one row each along dimension 0: a row that follows itself crosses as a number of times."""
    runs = [(row, len(list(same))) for row, same in itertools.groupby(kept, key=lambda each: each)]
    return runs[0][0] if len(runs) == 1 and runs[0][1] == 1 else RowsOf(runs)


def padded(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Return latents (rows, channels, height, width) with sides that ``patch`` divides, filled up as ComfyUI does."""
    if x.shape[2] % patch == 0 == x.shape[3] % patch:
        return x
    import comfy.ldm.common_dit

    result: torch.Tensor = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
    return result
