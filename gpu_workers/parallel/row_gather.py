"""Share the rows of several forwards over all ranks of a group, and bring their results to rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from xditd.gpu_workers.parallel.row_trees import Leaf


class Piece(NamedTuple):
    """Some rows of a part, and the rank that runs them."""

    part: int
    rows: range
    rank: int


class Share(NamedTuple):
    """The number of rows of a part, and whether different ranks may run them."""

    part: int
    rows: int
    can_split: bool


def pieces_of(rows: int, ranks: int) -> list[range]:
    """Return the rows that each rank runs of one part that is split.

    The rows of a rank depend on these numbers alone, so a call runs the rows that were checked: if rows are frames of
    videos, other pieces could give other results.
    """
    each = max(-(-rows // ranks), 1)
    return [range(start, min(start + each, rows)) for start in range(0, rows, each)]


def assign(shares: Sequence[Share], ranks: int) -> list[Piece]:
    """Share parts over ranks: whole ones, or split where they can be, if the rank with the most rows then has fewer.

    Returns the pieces in the order of parts and rows.
    """
    whole, whole_rows = _distribute([(share.part, range(share.rows)) for share in shares], ranks)
    split, split_rows = _distribute(
        [
            (share.part, rows)
            for share in shares
            for rows in (pieces_of(share.rows, ranks) if share.can_split else [range(share.rows)])
        ],
        ranks,
    )
    return split if split_rows < whole_rows else whole


def _distribute(pieces: Sequence[tuple[int, range]], ranks: int) -> tuple[list[Piece], int]:
    """Give each piece, longest first, to the rank with the fewest rows; return also the most rows of a rank."""
    loads = [0] * ranks
    found = []
    for part, rows in sorted(pieces, key=lambda each: -len(each[1])):
        rank = loads.index(min(loads))
        loads[rank] += len(rows)
        found.append(Piece(part, rows, rank))
    return sorted(found, key=lambda each: (each.part, each.rows.start)), max(loads)


class Transfer:
    """Sends the results of pieces to rank 0: :meth:`add` all pieces in one order on all ranks, then :meth:`run`.

    The communicator of the group's GPUs has to exist (:func:`connect`).
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._tag = 0
        self._operations: dict[str, list[dist.P2POp]] = {}
        self.tensors: dict[Piece, list[torch.Tensor]] = {}
        """On rank 0, those of every piece, valid after :meth:`run`; else those that this rank sends."""

    def add(self, piece: Piece, leaves: Iterable[Leaf], tensors: Iterable[torch.Tensor]) -> None:
        """Add a piece, whose results are ``leaves``. On the rank that has run it, ``tensors`` are the results.

        Allocates memory on rank 0, and waits for no other rank: all can agree afterwards whether there was room.
        """
        leaves = list(leaves)
        first_tag, self._tag = self._tag, self._tag + len(leaves)
        if self._rank not in (0, piece.rank):
            return
        if self._rank == piece.rank:
            kept = [each if piece.rank == 0 else each.contiguous() for each in tensors]
        else:
            kept = [torch.empty(leaf.shape, dtype=leaf.dtype, device=self._place(leaf)) for leaf in leaves]
        self.tensors[piece] = kept
        if piece.rank == 0:
            return
        operation, peer = (dist.irecv, piece.rank) if self._rank == 0 else (dist.isend, 0)
        for number, tensor in enumerate(kept):
            if tensor.numel():  # as bytes: NCCL does not have every dtype
                flat = tensor.view(-1).view(torch.uint8)
                added = self._operations.setdefault(tensor.device.type, [])
                added.append(dist.P2POp(operation, flat, peer, tag=first_tag + number))

    def run(self) -> None:
        """Send and receive. On GPUs the tensors arrive in the order of the current stream."""
        for operations in self._operations.values():
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    def _place(self, leaf: Leaf) -> torch.device:
        return torch.device("cpu") if leaf.device_type == "cpu" else self._device


def connect(device: torch.device) -> None:
    """Make the communicator of the group's GPUs, in which all ranks take part, before the first :class:`Transfer`."""
    if device.type == "cuda":
        dist.all_reduce(torch.zeros(1, device=device))
