"""A program, not a test: run the kernels of peers in Triton's interpreter, with the memory of ranks in this process.

Triton reads ``TRITON_INTERPRET`` when it is imported, so this needs a process of its own. It ends with status 0 if all
heads and tokens are where they should be, and nothing else was written.
"""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from xditd.gpu_workers.kernels import peer_kernels

UNTOUCHED = -7.0
OFFSET = 64


def check_heads(ranks: int, counts: tuple[int, ...], heads: int, head: int, batch: int, tensors: int) -> None:
    total = sum(counts)
    whole = torch.arange(float(tensors * batch * total * heads * head)).view(tensors, batch, total, heads, head)
    size = tensors * batch * total * heads // ranks * head
    memory = [torch.full((OFFSET // 4 + size + 8,), UNTOUCHED) for _ in range(ranks)]
    bases = torch.tensor([each.data_ptr() for each in memory])
    for rank, first in enumerate(itertools.accumulate((0, *counts[:-1]))):
        own = whole[:, :, first : first + counts[rank]].transpose(2, 3).contiguous().transpose(2, 3)  # other strides
        peer_kernels.send_heads(list(own), bases=bases, offset_bytes=OFFSET, first_row=first, all_rows=total)
    for rank, found in enumerate(memory):
        expected = whole[..., rank * heads // ranks : (rank + 1) * heads // ranks, :]
        arrived = found[OFFSET // 4 : OFFSET // 4 + size].view(expected.shape)
        assert torch.equal(arrived, expected), (ranks, counts, heads, head, batch, tensors, rank)
        assert (found[: OFFSET // 4] == UNTOUCHED).all()
        assert (found[OFFSET // 4 + size :] == UNTOUCHED).all()


def check_tokens(ranks: int, counts: tuple[int, ...], heads: int, head: int, batch: int) -> None:
    total, share = sum(counts), heads // ranks
    whole = torch.arange(float(batch * total * heads * head)).view(batch, total, heads, head)
    sizes = [batch * count * heads * head for count in counts]
    memory = [torch.full((OFFSET // 4 + size + 8,), UNTOUCHED) for size in sizes]
    bases, ends = torch.tensor([each.data_ptr() for each in memory]), torch.tensor(list(itertools.accumulate(counts)))
    for rank in range(ranks):
        own = whole[:, :, rank * share : (rank + 1) * share]
        peer_kernels.send_tokens(own, bases=bases, ends=ends, offset_bytes=OFFSET, rank=rank)
    for rank, (found, size) in enumerate(zip(memory, sizes, strict=True)):
        expected = whole[:, int(ends[rank]) - counts[rank] : int(ends[rank])]
        assert torch.equal(found[OFFSET // 4 : OFFSET // 4 + size].view(expected.shape), expected), (counts, rank)
        assert (found[: OFFSET // 4] == UNTOUCHED).all()
        assert (found[OFFSET // 4 + size :] == UNTOUCHED).all()


for case in ((2, (3, 2)), (3, (2, 2, 1)), (4, (1, 4, 2, 3))):
    for heads_of_a_rank, size, rows in ((1, 8, 2), (3, 5, 1)):
        check_tokens(*case, case[0] * heads_of_a_rank, size, rows)
        for count in (1, 2, 3) if case[0] == 2 else (3,):
            check_heads(*case, case[0] * heads_of_a_rank, size, rows, count)
