"""Tensors of which each rank holds a share of the tokens or of the heads: keys and values that calls keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from xditd.gpu_workers.parallel.streams import Ranks, Stream, gather, take
from xditd.gpu_workers.parallel.token_attention import Tokens


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is split over ranks along ``dim``: sequences, one after the other, each split by itself."""

    dim: int
    parts: tuple[Stream, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many entries each rank has."""
        return Tokens(self.parts).counts


class TokenShares:
    """Which tensors of this rank are shares, and of what. Every rank has a share of the same tensors."""

    def __init__(self) -> None:
        self._cuts = WeakTensorKeyDictionary()

    def __bool__(self) -> bool:
        return len(self._cuts) > 0

    def note(self, own: torch.Tensor, cut: Cut) -> None:
        """Note that a tensor is this rank's share."""
        self._cuts[own] = cut

    def find(self, tensor: torch.Tensor) -> Cut | None:
        """Return how a tensor is split over ranks, ``None`` if every rank has all of it."""
        found: Cut | None = self._cuts.get(tensor)
        return found

    def take(self, whole: torch.Tensor, dim: int, stream: Stream, rank: int) -> torch.Tensor:
        """Return this rank's share of a tensor, which does not keep the memory of the whole."""
        dim = dim + whole.ndim if dim < 0 else dim
        own = take(whole, dim, stream, rank).clone()
        self.note(own, Cut(dim, (stream,)))
        return own

    def shape_of(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of the whole of a tensor."""
        cut = self.find(tensor)
        if cut is None:
            return tuple(tensor.shape)
        return (*tensor.shape[: cut.dim], Tokens(cut.parts).total, *tensor.shape[cut.dim + 1 :])

    def whole(self, tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """Return the whole of a tensor. All ranks call this together; without a share there is nothing to gather."""
        cut = self.find(tensor)
        if cut is None:
            return tensor
        gathered = gather(tensor, cut.dim, cut.counts, ranks)
        if len(cut.parts) == 1:
            return gathered
        return gathered.index_select(cut.dim, Tokens(cut.parts).order(tensor.device).argsort())
