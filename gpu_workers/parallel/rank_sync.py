"""How ranks agree before any of them enters a collective: errors on all of them, flags, small numbers, GPUs.

Every rank of those that agree must call the same function at the same point. Flags go through a page of memory that the
ranks share, not by a collective: for a flag gloo wakes four threads one after the other, which takes 1 ms of every step
in virtual machines. Where a rank is gone, the others wait here until the leader ends the group.
"""

from __future__ import annotations

import mmap
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final

import torch
import torch.distributed as dist

from xditd.ipc.errors import OtherRankFailed, OutOfMemory, XditdError

_VALUE_BITS: Final = 8
_WORD_BYTES: Final = 8
_SPIN_S: Final = 200e-6
"""Ranks come to a meeting within a fraction of a millisecond of each other, or one of them has work to do first."""
_LONGEST_PAUSE_S: Final = 1e-3

_UUID_BYTES: Final = 64
_LENGTH_BYTES: Final = 4


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
            page = os.memfd_create("xditd-rank-sync", os.MFD_CLOEXEC)
            os.ftruncate(page, size)
            store.set(key, f"/proc/{os.getpid()}/fd/{page}")
        else:
            page = os.open(store.get(key), os.O_RDWR | os.O_CLOEXEC)
        self._words = memoryview(mmap.mmap(page, size)).cast("q")
        _barrier()  # everyone has it
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


class RankSet(Enum):
    """Which ranks agree with each other."""

    GROUP = "all ranks"
    SEQUENCE = "the ranks that share the tokens of an image"


_pages: dict[RankSet, _Page] = {}


def share_page(store: dist.Store, key: str, rank: int, ranks: int, members: RankSet = RankSet.GROUP) -> None:
    """Share a page of memory with the other ranks of a set.

    They find it through ``store`` under ``key``, which is new and the same for all of a set; ``rank`` counts within
    it. All ranks of the process group call this at the same point, each for its own set.
    """
    _pages.pop(members, None)
    if ranks > 1:
        _pages[members] = _Page(store, key, rank, ranks)


def agree(ok: bool, among: RankSet = RankSet.GROUP) -> bool:
    """Return whether ``ok`` is true on every rank."""
    page = _pages.get(among)
    return ok if page is None else all(page.exchange(ok))


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
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
    page = _pages.get(RankSet.GROUP)
    return flag if page is None else bool(page.exchange(flag)[0])


def gather_uuids(device_uuid: str, world_size: int) -> tuple[str, ...]:
    """Tell every rank the GPU of every other; empty names on the CPU."""
    return tuple(name.decode() for name in gather_bytes(device_uuid.encode(), _UUID_BYTES, world_size))


def gather_bytes(mine: bytes, most_bytes: int, world_size: int) -> list[bytes]:
    """Tell every rank what each one has to say, at most ``most_bytes``, which all name alike."""
    assert len(mine) <= most_bytes
    padded = len(mine).to_bytes(_LENGTH_BYTES, "big") + mine.ljust(most_bytes, b"\0")
    everyone = [torch.zeros(len(padded), dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(everyone, torch.tensor(list(padded), dtype=torch.uint8))
    rows = [bytes(row.tolist()) for row in everyone]
    return [row[_LENGTH_BYTES:][: int.from_bytes(row[:_LENGTH_BYTES], "big")] for row in rows]


@contextmanager
def raise_on_all_ranks(among: RankSet = RankSet.GROUP) -> Iterator[None]:
    """Run a block that may fail; where it fails on one rank of ``among``, raise on all of them.

    An error of this rank is raised here once the others know; where another rank failed, this one raises
    ``OtherRankFailed``. So no rank goes on to a collective that another one will not enter.
    """
    fault: XditdError | None = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        # It stays behind the other one as its context, and the frames that failed hold views of what is to be unmapped.
        traceback.clear_frames(error.__traceback__)
        fault = OutOfMemory(f"the GPU has no room: {error}".split("\n")[0])
    except XditdError as error:
        fault = error
    if agree(fault is None, among):
        return
    if fault is not None:
        raise fault
    raise OtherRankFailed("another rank refused; its error says why")


@contextmanager
def using_all_cores(device: torch.device) -> Iterator[None]:
    """Run a block on rank 0 alone, while the other ranks wait: on the CPU it takes their cores too.

    The result is then that of one process, too: with fewer threads sums are split elsewhere, and the encoder of a
    VAE gave latents that differed by 1.9e-6.
    """
    if device.type != "cpu":
        yield
        return
    share = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(share)


def _barrier() -> None:
    """Wait for all ranks. dist.barrier() would go through NCCL."""
    dist.all_reduce(torch.zeros(1))
