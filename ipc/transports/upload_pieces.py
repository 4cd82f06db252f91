"""Divide an upload into pieces: ranges of a file or of memory, each read into a buffer at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import torch

_MAX_GAP_BYTES: Final = 4096
"""The most bytes between two ranges of a file, such as padding, that are read with them in one piece."""


class FileStretch(NamedTuple):
    """A range of bytes in an open file, to be uploaded; ``path`` is for messages."""

    fd: int
    offset_bytes: int
    nbytes: int
    path: str


class Copy(NamedTuple):
    """The bytes of pair ``number`` that are in a piece."""

    number: int
    offset_bytes: int
    """Where they begin in the piece."""
    target: int
    """A device address."""
    nbytes: int


class Piece(NamedTuple):
    """Bytes that are read into a buffer at once, and copied from there.

    They are of one pair, or of several that follow each other in a file or in memory.
    """

    file: FileStretch | None
    """A range of the file that is read, or ``None`` for memory. Its descriptor and path are used, not its bounds."""
    start: int
    """Offset in the file, or a host address."""
    nbytes: int
    copies: tuple[Copy, ...]


class _Neighbours(NamedTuple):
    """Pairs whose bytes follow each other in a file or in memory."""

    file: FileStretch | None
    start: int
    first_piece: int
    starts: list[int]
    """Where the bytes of each pair begin."""
    pairs: list[tuple[int, int, int]]
    """The number of each pair, its device address and its bytes."""

    @property
    def end(self) -> int:
        return self.starts[-1] + self.pairs[-1][2]


class Pieces:
    """The bytes of all pairs, divided into pieces, in order. Each is described when a thread takes it.

    A piece costs a read and calls of the driver, however small it is. So pairs that follow each other share one.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor | FileStretch, torch.Tensor]], piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self.of_pairs: list[int] = []
        """In how many pieces each pair is."""
        self.nbytes = 0
        self._all: list[_Neighbours] = []
        last: _Neighbours | None = None
        for number, (source, target) in enumerate(pairs):
            file = source if isinstance(source, FileStretch) else None
            start = source.offset_bytes if isinstance(source, FileStretch) else source.data_ptr()
            nbytes = source.nbytes
            if not nbytes:
                self.of_pairs.append(0)
                continue
            follows = last is not None and _is_same_file(last.file, file)
            if last is None or not follows or not 0 <= start - last.end <= (_MAX_GAP_BYTES if file else 0):
                last = _Neighbours(file, start, len(self), [], [])
                self._all.append(last)
            last.starts.append(start)
            last.pairs.append((number, target.data_ptr(), nbytes))
            first, past = start - last.start, start - last.start + nbytes
            self.of_pairs.append((past - 1) // piece_bytes - first // piece_bytes + 1)
            self.nbytes += nbytes
        self._first_pieces = [each.first_piece for each in self._all]

    def __len__(self) -> int:
        if not self._all:
            return 0
        last = self._all[-1]
        return last.first_piece + -(-(last.end - last.start) // self._piece_bytes)

    def make(self, number: int) -> Piece:
        """Describe a piece, by its number. Safe in any thread."""
        found = self._all[bisect_right(self._first_pieces, number) - 1]
        start = found.start + (number - found.first_piece) * self._piece_bytes
        end = min(start + self._piece_bytes, found.end)
        copies: list[Copy] = []
        at = bisect_right(found.starts, start) - 1
        while at < len(found.starts) and found.starts[at] < end:
            pair, target, nbytes = found.pairs[at]
            from_, to = max(start, found.starts[at]), min(end, found.starts[at] + nbytes)
            if from_ < to:
                copies.append(Copy(pair, from_ - start, target + from_ - found.starts[at], to - from_))
            at += 1
        return Piece(found.file, start, end - start, tuple(copies))


def _is_same_file(one: FileStretch | None, other: FileStretch | None) -> bool:
    return one is other or (one is not None and other is not None and (one.fd, one.path) == (other.fd, other.path))
