"""The process groups of Ulysses and ring attention: made once for each pair of degrees, switched between forwards.

The product of both degrees, the number of ranks that share an image's tokens, is fixed when the group starts. Each
model has its own pair, since the Ulysses degree must divide its attention heads. xfuser makes the groups of one pair,
and keeps them in its own and yunchang's variables, which every attention layer reads. This module sets those variables.

Ranks are ordered as in yunchang (``set_seq_parallel_pg``): Ulysses groups are neighbours, rings have a stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from xditd.ipc.degrees import Degrees


class _Split(NamedTuple):
    """Groups of ``size`` ranks each, ``stride`` ranks apart."""

    stride: int
    size: int


class _SequenceGroups:
    """The groups that this rank is in."""

    def __init__(self, degrees: Degrees, timeout: timedelta) -> None:
        from xfuser.core.distributed import get_sp_group

        self._world_size, self._sequence, self._timeout = degrees.world_size, degrees.sequence, timeout
        started = get_sp_group()
        self._made = {
            _ulysses(degrees): started.ulysses_group,
            _ring(degrees): started.ring_group,
        }

    def make(self, degrees: Degrees) -> None:
        assert degrees.sequence == self._sequence, f"{degrees} is for other ranks than {self._sequence}"
        for split in (_ulysses(degrees), _ring(degrees)):
            if split not in self._made:
                self._made[split] = self._new_group(split)

    def use(self, degrees: Degrees) -> None:
        from xfuser.core.distributed import get_sp_group
        from yunchang.globals import PROCESS_GROUP

        current = get_sp_group()
        if (current.ulysses_world_size, current.ring_world_size) == (degrees.ulysses, degrees.ring):
            return
        ulysses, ring = self._made[_ulysses(degrees)], self._made[_ring(degrees)]
        current.ulysses_group, current.ring_group = ulysses, ring
        current.ulysses_world_size, current.ring_world_size = degrees.ulysses, degrees.ring
        current.ulysses_rank, current.ring_rank = dist.get_rank(ulysses), dist.get_rank(ring)
        PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = ulysses, ring

    def _new_group(self, split: _Split) -> dist.ProcessGroup:
        """Make the groups of all ranks; torch needs every rank to make every group, also those it is not in."""
        own: dist.ProcessGroup | None = None
        for ranks in _members(split, self._sequence, self._world_size):
            group = dist.new_group(ranks, timeout=self._timeout)
            if dist.get_rank() in ranks:
                own = group
        assert own is not None
        return own


_groups: _SequenceGroups | None = None


def start(degrees: Degrees, timeout: timedelta) -> None:
    """Take over the groups that xfuser has made for ``degrees``. Call once, after xfuser's start.

    ``timeout`` is that of making further groups, and of collectives in them.
    """
    global _groups
    _groups = _SequenceGroups(degrees, timeout)


def make(degrees: Degrees) -> None:
    """Make the missing groups for ``degrees``. Every rank of the process group calls this at the same point.

    ``degrees.sequence`` is the same as at the start.
    """
    _started().make(degrees)


def use(degrees: Degrees) -> None:
    """Switch this process's attention to the groups of ``degrees``, made before.

    Call it before every forward: without a change it costs one comparison.
    """
    _started().use(degrees)


def _started() -> _SequenceGroups:
    assert _groups is not None, "no group was started"
    return _groups


def _ulysses(degrees: Degrees) -> _Split:
    return _Split(1, degrees.ulysses)


def _ring(degrees: Degrees) -> _Split:
    # A group of one rank has no stride, so that it equals the group of one for Ulysses.
    return _Split(degrees.ulysses if degrees.ring > 1 else 1, degrees.ring)


def _members(split: _Split, sequence: int, world_size: int) -> Iterator[list[int]]:
    """List the ranks of each group, in an order that is the same on every rank."""
    span = split.stride * split.size
    for first in range(0, world_size, sequence):
        for block in range(first, first + sequence, span):
            for start_rank in range(block, block + split.stride):
                yield list(range(start_rank, block + span, split.stride))
