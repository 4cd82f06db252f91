"""Partition the upload of host memory over ranks: which rank uploads which bytes of a buffer.

All ranks compute the same shares, since all have the same manifest and the same offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from xditd.ipc.tensors import TensorSpec
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES, align

SHARED_FROM_BYTES: Final = 64 * 2**20
"""Every rank uploads a smaller buffer whole: opening and closing another rank's memory takes as many milliseconds."""


class CopyRange(NamedTuple):
    """Bytes of block number ``block`` from ``start``, copied to byte ``to`` of the buffer."""

    block: int
    start: int
    to: int
    nbytes: int


def join_ranges(specs: Sequence[TensorSpec], offsets: Sequence[int]) -> list[CopyRange]:
    """Join tensors that are adjacent in their block and in the buffer (at ``offsets``) into one range.

    A checkpoint has hundreds of small tensors, and a copy for each would be slow.
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
    """Split a range of bytes into ``parts`` of whole allocation units; the last ones may be shorter, or empty."""
    part = align(-(-len(whole) // parts), ALLOCATION_BYTES)
    edges = [min(whole.start + number * part, whole.stop) for number in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(edges)]


def clip_ranges(ranges: Sequence[CopyRange], share: range) -> list[CopyRange]:
    """Return the parts of ``ranges`` that lie in ``share``, a range of the buffer."""
    found: list[CopyRange] = []
    for block, start, to, nbytes in ranges:
        first, end = max(to, share.start), min(to + nbytes, share.stop)
        if first < end:
            found.append(CopyRange(block, start + first - to, first, end - first))
    return found
