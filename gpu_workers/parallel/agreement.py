"""Agreement between ranks: a small number from each, through a page of memory that they share, never an object.

Every rank of those that agree must call the same function at the same point. Not by a collective: gloo wakes four
threads one after the other for a flag, 1 ms of every ``denoise`` step where waking is slow, as in virtual machines.
Where a fellow is gone, ranks wait here until the leader, which is told of every rank's end, ends the group.
"""

from __future__ import annotations

import mmap
import os
import time
from enum import Enum
from typing import Final

import torch
import torch.distributed as dist

_VALUE_BITS: Final = 8
_WORD_BYTES: Final = 8
_SPIN_S: Final = 200e-6
"""Ranks come to a meeting within a fraction of a millisecond of each other, or one of them has work to do first."""
_LONGEST_PAUSE_S: Final = 1e-3


class _Page:
    """Two words for each rank, used in turns: the number of the round, and what the rank said in it.

    A rank enters the round after next, and overwrites its word, once all others have entered the next one. By then they
    have read it. Words are written and read whole, so that no order of two writes matters.
    """

    def __init__(self, store: dist.Store, key: str, rank: int, ranks: int) -> None:
        self._rank, self._ranks, self._round = rank, ranks, 0
        size = 2 * ranks * _WORD_BYTES
        if rank == 0:
            # Memory without a name in any folder: a file could be removed before everyone has opened it.
            page = os.memfd_create("xditd-agreement", os.MFD_CLOEXEC)
            os.ftruncate(page, size)
            store.set(key, f"/proc/{os.getpid()}/fd/{page}")
        else:
            page = os.open(store.get(key), os.O_RDWR | os.O_CLOEXEC)
        self._words = memoryview(mmap.mmap(page, size)).cast("q")
        _meet()  # everyone has it
        os.close(page)

    def exchange(self, value: int) -> list[int]:
        self._round += 1
        first = self._round % 2 * self._ranks
        self._words[first + self._rank] = self._round << _VALUE_BITS | value
        return [self._read(first + rank) for rank in range(self._ranks)]

    def _read(self, at: int) -> int:
        began_s = time.perf_counter()
        while (word := self._words[at]) >> _VALUE_BITS != self._round:
            waited_s = time.perf_counter() - began_s
            if waited_s > _SPIN_S:  # an eighth of the wait so far: short waits stay short, long ones cost nothing
                time.sleep(min(waited_s / 8, _LONGEST_PAUSE_S))
        return word & ((1 << _VALUE_BITS) - 1)


class Circle(Enum):
    """Who agrees."""

    GROUP = "all ranks"
    IMAGE = "the ranks that share the tokens of an image"


_pages: dict[Circle, _Page] = {}


def join(store: dist.Store, key: str, rank: int, ranks: int, circle: Circle = Circle.GROUP) -> None:
    """Share a page of memory with the other ranks of a circle.

    They find it through ``store`` under ``key``, which is new and the same for all of a circle; ``rank`` counts within
    it. All ranks of the process group call this at the same point, each for its own circle.
    """
    _pages.pop(circle, None)
    if ranks > 1:
        _pages[circle] = _Page(store, key, rank, ranks)


def agree(ok: bool, among: Circle = Circle.GROUP) -> bool:
    """Return whether ``ok`` is true on every rank."""
    page = _pages.get(among)
    return ok if page is None else all(page.exchange(ok))


def add_up(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of a gloo group's ``values``, a few numbers on the CPU, with the same bits on every rank.

    Every rank adds the same numbers in the same order, which an all-reduce does not promise.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return values
    everyone = [torch.empty_like(values) for _ in range(ranks)]
    dist.all_gather(everyone, values, group=group)
    return torch.stack(everyone).sum(0)


def broadcast_stop(flag: bool) -> bool:
    """Return rank 0's ``flag`` on every rank; the others' arguments are ignored."""
    page = _pages.get(Circle.GROUP)
    return flag if page is None else bool(page.exchange(flag)[0])


def _meet() -> None:
    """Wait for all ranks. dist.barrier() would go through NCCL."""
    dist.all_reduce(torch.zeros(1))
