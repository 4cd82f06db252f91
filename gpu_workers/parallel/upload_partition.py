"""Which rank uploads what of a buffer that all ranks fill with the same bytes of the host: numbers alone, no copies.

Every rank lays the same tensors out in the same way, since all have the same manifest. So all agree on the shares
without asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from xditd.ipc.tensors import TensorSpec
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES, align

SHARED_FROM_BYTES: Final = 64 * 2**20
"""A smaller buffer every rank uploads whole: that takes a few milliseconds, and so does opening and closing the
memory of another rank."""


class CopyRange(NamedTuple):
    """Bytes of block number ``block`` from ``start``, which belong at ``to`` in the copy."""

    block: int
    start: int
    to: int
    nbytes: int


def join_ranges(specs: Sequence[TensorSpec], offsets: Sequence[int]) -> list[CopyRange]:
    """Join tensors that follow each other in their block and in the copy, where each has its offset.

    A checkpoint has hundreds of small tensors, and one copy for each would cost more than their bytes.
    """
    found: list[CopyRange] = []
    for spec, offset in zip(specs, offsets, strict=True):
        if found:
            block, start, to, nbytes = found[-1]
            if (block, start + nbytes, to + nbytes) == (spec.block, spec.offset_bytes, offset):
                found[-1] = CopyRange(block, start, to, nbytes + spec.extent_bytes)
                continue
        found.append(CopyRange(spec.block, spec.offset_bytes, offset, spec.extent_bytes))
    return found


def split(whole: range, parts: int) -> list[range]:
    """Split bytes of a buffer into parts, in order, of whole allocations; the last ones may be shorter, or empty."""
    part = align(-(-len(whole) // parts), ALLOCATION_BYTES)
    edges = [min(whole.start + number * part, whole.stop) for number in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(edges)]


def clip_ranges(ranges: Sequence[CopyRange], share: range) -> list[CopyRange]:
    """Return what of the ranges lies in a share of the copy; those that cross its edges are cut."""
    found: list[CopyRange] = []
    for block, start, to, nbytes in ranges:
        first, end = max(to, share.start), min(to + nbytes, share.stop)
        if first < end:
            found.append(CopyRange(block, start + first - to, first, end - first))
    return found
