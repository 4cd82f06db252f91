"""Synchronise ranks: raise an error on all of them, agree on flags, exchange small values.

All ranks of a set must call the same function at the same point. Flags go through a page of shared memory, not a
collective: gloo wakes four threads in turn for a flag, which takes 1 ms of every step in virtual machines. If a rank
has died, the others wait here until the leader ends the group.
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

from xditd.gpu_workers.parallel.rank_errors import is_host_out_of_memory, out_of_memory
from xditd.ipc.errors import OtherRankFailed, OutOfMemory, XditdError

_VALUE_BITS: Final = 8
_WORD_BYTES: Final = 8
_SPIN_S: Final = 200e-6
"""Ranks mostly arrive within a fraction of a millisecond of each other."""
_LONGEST_PAUSE_S: Final = 1e-3

_UUID_BYTES: Final = 64
_LENGTH_BYTES: Final = 4


class _Page:
    """Shared memory with three words for each rank.

    Two are used in turn: the number of the round, and the rank's value. A rank overwrites a word two rounds later, when
    all others have entered the round between, and so have read it. Words are written and read whole, so the order of
    writes does not matter. The third is what the rank has posted.
    """

    def __init__(self, store: dist.Store, key: str, rank: int, ranks: int) -> None:
        self._rank, self._ranks, self._round = rank, ranks, 0
        size = 3 * ranks * _WORD_BYTES
        if rank == 0:
            # A memfd: a file in a folder could be removed before all ranks have opened it.
            page = os.memfd_create("xditd-rank-sync", os.MFD_CLOEXEC)
            os.ftruncate(page, size)
            store.set(key, f"/proc/{os.getpid()}/fd/{page}")
        else:
            page = os.open(store.get(key), os.O_RDWR | os.O_CLOEXEC)
        self._words = memoryview(mmap.mmap(page, size)).cast("q")
        _barrier()  # all ranks have opened it
        os.close(page)

    def exchange(self, value: int) -> list[int]:
        self._round += 1
        first = self._round % 2 * self._ranks
        self._words[first + self._rank] = self._round << _VALUE_BITS | value
        return [self._read(first + rank) for rank in range(self._ranks)]

    def post(self, count: int) -> None:
        self._words[2 * self._ranks + self._rank] = count

    def posted(self, rank: int) -> int:
        return self._words[2 * self._ranks + rank]

    def _read(self, at: int) -> int:
        began_s = time.perf_counter()
        while (word := self._words[at]) >> _VALUE_BITS != self._round:
            waited_s = time.perf_counter() - began_s
            if waited_s > _SPIN_S:  # sleep an eighth of the wait so far
                time.sleep(min(waited_s / 8, _LONGEST_PAUSE_S))
        return word & ((1 << _VALUE_BITS) - 1)


class RankSet(Enum):
    """A set of ranks that agree with each other."""

    GROUP = "all ranks"
    SEQUENCE = "the ranks that share the tokens of an image"


_pages: dict[RankSet, _Page] = {}


def share_page(store: dist.Store, key: str, rank: int, ranks: int, members: RankSet = RankSet.GROUP) -> None:
    """Share a page of memory with the other ranks of a set.

    ``key`` is its key in ``store``, new and the same on all ranks of the set; ``rank`` counts within the set. All ranks
    of the process group call this at the same point, each for its own set.
    """
    _pages.pop(members, None)
    if ranks > 1:
        _pages[members] = _Page(store, key, rank, ranks)


def agree(ok: bool, among: RankSet = RankSet.GROUP) -> bool:
    """Return whether ``ok`` is true on every rank."""
    page = _pages.get(among)
    return ok if page is None else all(page.exchange(ok))


def share_value(value: int) -> list[int]:
    """Return the value of every rank, each below 256; that of this process alone if it is no rank."""
    page = _pages.get(RankSet.GROUP)
    return [value] if page is None else page.exchange(value)


def post(count: int) -> None:
    """Show a number to the other ranks of the group, until the next one. Nobody waits."""
    _pages[RankSet.GROUP].post(count)


def posted(rank: int) -> int:
    """Return the number that a rank of the group has posted last, 0 before its first."""
    return _pages[RankSet.GROUP].posted(rank)


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of ``values`` (a few numbers on the CPU) over a gloo group, with the same bits on every rank.

    All ranks add in the same order, which an all-reduce does not guarantee.
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
    """Return the GPU UUID of every rank; empty on the CPU."""
    return tuple(name.decode() for name in gather_bytes(device_uuid.encode(), _UUID_BYTES, world_size))


def gather_bytes(mine: bytes, max_bytes: int, world_size: int) -> list[bytes]:
    """Return every rank's bytes, at most ``max_bytes`` each, which is the same on all ranks."""
    assert len(mine) <= max_bytes
    padded = len(mine).to_bytes(_LENGTH_BYTES, "big") + mine.ljust(max_bytes, b"\0")
    everyone = [torch.zeros(len(padded), dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(everyone, torch.frombuffer(bytearray(padded), dtype=torch.uint8))
    rows = [row.numpy().tobytes() for row in everyone]
    return [row[_LENGTH_BYTES:][: int.from_bytes(row[:_LENGTH_BYTES], "big")] for row in rows]


@contextmanager
def raise_on_all_ranks(among: RankSet = RankSet.GROUP) -> Iterator[None]:
    """Run a block; if it fails on one rank of ``among``, raise on all of them.

    A rank that failed raises its own error, the others raise ``OtherRankFailed``. So no rank enters a collective that
    another one never enters.
    """
    fault: XditdError | None = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        # It stays as the context of the next error, and its frames hold views of memory that must be unmapped.
        traceback.clear_frames(error.__traceback__)
        fault = OutOfMemory(f"the GPU has no room: {error}".split("\n")[0])
    except XditdError as error:
        fault = error
    except (MemoryError, RuntimeError) as error:
        if not is_host_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        fault = out_of_memory(error)
    if agree(fault is None, among):
        return
    if fault is not None:
        raise fault
    raise OtherRankFailed("another rank refused; its error says why")


@contextmanager
def using_all_cores(device: torch.device) -> Iterator[None]:
    """Use all cores for a block that rank 0 runs alone while the other ranks wait.

    The bits are then those of one process: with fewer threads sums are split differently, and the latents of a VAE's
    encoder differed by 1.9e-6.
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
    """Wait for all ranks. dist.barrier() would use NCCL."""
    dist.all_reduce(torch.zeros(1))
