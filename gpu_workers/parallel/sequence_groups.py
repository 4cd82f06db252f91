"""The process groups in which xfuser's attention shares tokens: made once for each shape, exchanged between forwards.

A shape is how many ranks exchange heads (Ulysses) and how many pass keys and values on (ring). Their product, the ranks
that share one image's tokens, is fixed when the group starts; the shape is each model's own, since its attention heads
have to divide by the Ulysses degree. xfuser makes the groups of one shape. It keeps them in variables of its own and of
yunchang's, where every attention layer finds them: those variables are set here.

Ranks are laid out as yunchang does (``set_seq_parallel_pg``): Ulysses groups are neighbours, rings step over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from xditd.ipc.degrees import Degrees


class _Split(NamedTuple):
    """How the ranks that share tokens form groups: of ``size`` ranks each, which are ``stride`` ranks apart."""

    stride: int
    size: int


class _SequenceGroups:
    """The groups of this process that have been made, those of other ranks being theirs."""

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
        """Make the groups of all ranks, as torch wants it: every rank makes every group, also those it is not in."""
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

    Ranks wait for each other up to ``timeout`` in the groups that are made later, and while they make them.
    """
    global _groups
    _groups = _SequenceGroups(degrees, timeout)


def make(degrees: Degrees) -> None:
    """Make the groups of a shape that are missing. Every rank of the process group calls this at the same point.

    ``degrees`` share tokens between as many ranks as those of the start did.
    """
    _started().make(degrees)


def use(degrees: Degrees) -> None:
    """Make this, a shape that was made, the one that attention of this process runs in from now on.

    Call it before every forward: it costs a comparison where nothing changes.
    """
    _started().use(degrees)


def _started() -> _SequenceGroups:
    assert _groups is not None, "no group was started"
    return _groups


def _ulysses(degrees: Degrees) -> _Split:
    return _Split(1, degrees.ulysses)


def _ring(degrees: Degrees) -> _Split:
    # A rank alone, whatever the stride: one group serves every shape without a ring, or without Ulysses.
    return _Split(degrees.ulysses if degrees.ring > 1 else 1, degrees.ring)


def _members(split: _Split, sequence: int, world_size: int) -> Iterator[list[int]]:
    """List the ranks of each group, in an order that is the same on every rank."""
    span = split.stride * split.size
    for first in range(0, world_size, sequence):
        for block in range(first, first + sequence, span):
            for start_rank in range(block, block + split.stride):
                yield list(range(start_rank, block + span, split.stride))
