"""Partition the rows of a batch over the two halves of a group (CFG parallel), and gather their results.

A client that uses a negative prompt sends a row for each prompt in one request. A single row is not split: both halves
run it.
"""

from __future__ import annotations

import torch
from xfuser.core.distributed import (
    get_cfg_group,
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
)

from xditd.gpu_workers.parallel.rank_sync import sum_over_ranks
from xditd.gpu_workers.parallel.token_partition import pad_end


def partition_rows(rows: int, halves: int, half: int) -> slice:
    """Return the rows that one half works on. The first half gets one more if their number is odd."""
    if rows < halves:
        return slice(0, rows)
    each = -(-rows // halves)
    return slice(half * each, min((half + 1) * each, rows))


def halves() -> int:
    """Return the CFG degree: 2, or 1 if rows are not split."""
    return int(get_classifier_free_guidance_world_size())


def rows_of_half(rows: int, half: int) -> slice:
    """Return the rows of a batch of ``rows`` that a half of this group works on."""
    return partition_rows(rows, halves(), half)


def own_rows(rows: int) -> slice:
    """Return the rows of a batch of ``rows`` that this rank works on."""
    return rows_of_half(rows, get_classifier_free_guidance_rank())


def gather_flat(mine: torch.Tensor, longest: int) -> torch.Tensor:
    """Gather the tensors of all halves, (halves, longest), padded, since all_gather needs equal lengths."""
    gathered: torch.Tensor = get_cfg_group().all_gather(pad_end(mine, longest - mine.shape[0], dim=0), dim=0)
    return gathered.view(halves(), longest)


def add_halves(count: int, rows: int) -> int:
    """Return the sum of the counts of all halves, if they split ``rows``."""
    if rows < get_classifier_free_guidance_world_size():
        return count
    return int(sum_over_ranks(torch.tensor(count), get_cfg_group().cpu_group))
