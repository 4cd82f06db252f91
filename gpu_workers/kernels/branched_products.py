"""The products of fused blocks with LoRAs: those of other products, and the branches of their projections.

Only forwards with LoRAs use them, so that others take the kernels that they have without: a branch is added before
GELU, by one kernel for both, or by two. Several LoRAs are one branch (``branch_stacks``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from xditd.gpu_workers.kernels.branch_kernels import add_and_gelu, can_add_and_gelu
from xditd.gpu_workers.kernels.branch_stacks import BranchStacks, Pair
from xditd.gpu_workers.kernels.branches import Branch, Branches, add_branches, joined
from xditd.gpu_workers.kernels.products import TensorRows
from xditd.gpu_workers.kernels.static_branches import Place, StaticLayout

LinearT = TypeVar("LinearT")

Matrices = Callable[[torch.Tensor, int], torch.Tensor]
"""Multiplies vectors with many matrices, of so many rows each: (vectors, matrices, rows)."""


class Part(NamedTuple):
    """Outputs of a checkpoint's layer that are one projection of a block."""

    layer: str
    start: int
    stop: int


class BranchTable:
    """The branches of a checkpoint's layers, in the parts that blocks project with.

    ``places`` says where the outputs of each layer of the module are: in which layer of the checkpoint, from where on.
    """

    def __init__(self, parts: Iterable[Part], places: Mapping[str, tuple[str, int]]) -> None:
        self._parts: dict[str, list[tuple[Part, Branches]]] = {}
        self._places = places
        self.stacks = BranchStacks()
        """Factors of several LoRAs, which outlive a change of the checkpoint."""
        for part in parts:
            self._parts.setdefault(part.layer, []).append((part, Branches()))

    def at(self, layer: str, rows: slice = slice(None)) -> Branches:
        """Return the branches of a part: of all outputs of a layer, or of those ``rows``."""
        found = self._parts[layer]
        last = found[-1][0].stop
        start, stop, _ = rows.indices(last)
        return next(branches for part, branches in found if (part.start, part.stop) == (start, stop))

    def places(self, layers: Container[str]) -> list[Place]:
        """Return all parts of some layers, in an order that is that of every rank."""
        return [
            Place(branches, part.stop - part.start)
            for layer, parts in self._parts.items()
            if layer in layers
            for part, branches in parts
        ]

    def slots(self, by_layer: Mapping[str, Sequence[Branch]]) -> list[tuple[Branches, tuple[Branch, ...]]]:
        """Return which branches a LoRA adds to which parts, from those of the module's layers.

        Branches of neighbouring layers that are rows of one factor are one branch again.
        """
        moved: dict[str, list[Branch]] = {}
        for name, given in by_layer.items():
            if name in self._places:
                layer, at = self._places[name]
                moved.setdefault(layer, []).extend(each.moved(at) for each in given)
        found: list[tuple[Branches, tuple[Branch, ...]]] = []
        for layer, parts in moved.items():
            together = joined(parts)
            for part, branches in self._parts.get(layer, ()):
                rows = [each.rows(part.start, part.stop) for each in together]
                mine = tuple(each for each in rows if each is not None)
                if mine:
                    found.append((branches, mine))
        return found


class Branched(NamedTuple, Generic[LinearT]):
    """A projection of other products, and its branches."""

    linear: LinearT
    branches: Branches


class BranchedProducts(TensorRows):
    """``products`` whose rows are plain tensors, with the branches of a table, or those of a ``layout``, if set.

    With a layout, they depend neither on the LoRAs that are switched on nor on their strengths.
    """

    def __init__(self, products: TensorRows, table: BranchTable) -> None:
        self._products: Any = products
        self._table = table
        self.layout: StaticLayout | None = None
        self._last: _Low | None = None

    def linear(self, name: str, rows: slice = slice(None)) -> Branched[Any]:
        return Branched(self._products.linear(name, rows), self._table.at(name, rows))

    def multiply(self, rows: torch.Tensor, linear: Branched[Any], out: torch.Tensor) -> None:
        self._products.multiply(rows, linear.linear, out)
        for pair in self._pairs(linear.branches, out.shape[1]):
            _add(pair, self._low(rows, pair), out)

    def mlp(self, rows: torch.Tensor, up: Branched[Any], down: Branched[Any], out: torch.Tensor) -> None:
        if not (self._has(up) or self._has(down)):
            self._products.mlp(rows, up.linear, down.linear, out)
            return
        hidden = rows.new_empty(rows.shape[0], up.linear.bias.shape[0])
        self._up(rows, up, hidden)
        self.multiply(hidden, down, out)
        self._last = None

    def mlp_and_attention(
        self, attended: torch.Tensor, rows: torch.Tensor, up: Branched[Any], second: Branched[Any], out: torch.Tensor
    ) -> None:
        if not (self._has(up) or self._has(second)):
            self._products.mlp_and_attention(attended, rows, up.linear, second.linear, out)
            return
        width = attended.shape[1]
        both = rows.new_empty(rows.shape[0], width + up.linear.bias.shape[0])
        both[:, :width] = attended
        self._up(rows, up, both[:, width:])
        self.multiply(both, second, out)
        self._last = None

    def _has(self, linear: Branched[Any]) -> bool:
        return bool(linear.branches.active if self.layout is None else id(linear.branches) in self.layout.pairs)

    def _pairs(self, branches: Branches, outputs: int) -> list[Pair]:
        if self.layout is None:
            return self._table.stacks.pairs(branches, outputs)
        pair = self.layout.pairs.get(id(branches))
        return [] if pair is None else [pair]

    def _up(self, rows: torch.Tensor, up: Branched[Any], out: torch.Tensor) -> None:
        pairs = self._pairs(up.branches, out.shape[1])
        if not pairs and out.is_contiguous():  # torch has no GELU in products into a slice
            self._products.up(rows, up.linear, out)
            return
        self._products.multiply(rows, up.linear, out)
        lows = [self._low(rows, pair) for pair in pairs]
        self._last = None
        if len(pairs) == 1 and pairs[0].up.shape[0] == out.shape[1] and can_add_and_gelu(out, lows[0], pairs[0].up):
            add_and_gelu(out, lows[0], pairs[0].up, pairs[0].alpha)
            return
        for pair, low in zip(pairs, lows, strict=True):
            _add(pair, low, out)
        torch.ops.aten.gelu_(out, approximate="tanh")

    def _low(self, rows: torch.Tensor, pair: Pair) -> torch.Tensor:
        """Return ``down x`` (rows, rank) with its scales: for projections with the same rows and factor, once."""
        last = self._last
        if last is not None and last.rows() is rows and last.down() is pair.down and last.scales is pair.scales:
            return last.low
        low = torch.mm(rows.to(pair.down.dtype), pair.down.t())
        if pair.scales is not None:
            low.mul_(pair.scales)
        self._last = _Low(weakref.ref(rows), weakref.ref(pair.down), pair.scales, low)
        return low


class _Low(NamedTuple):
    """The last ``down x``, without a reference to lent memory."""

    rows: weakref.ref[torch.Tensor]
    down: weakref.ref[torch.Tensor]
    scales: torch.Tensor | None
    low: torch.Tensor


def _add(pair: Pair, low: torch.Tensor, out: torch.Tensor) -> None:
    part = out[:, pair.start : pair.start + pair.up.shape[0]]
    if part.dtype == pair.up.dtype:
        part.addmm_(low, pair.up.t(), alpha=pair.alpha)
    else:
        part.add_(torch.mm(low, pair.up.t()), alpha=pair.alpha)


def with_branches(matrices: Matrices, branches: Sequence[Branches]) -> Matrices:
    """Return matrices that also have branches, each its own."""

    def multiply(vectors: torch.Tensor, rows: int) -> torch.Tensor:
        found = matrices(vectors, rows)
        for number, each in enumerate(branches):
            add_branches(each.active, found[:, number], vectors)
        return found

    return multiply
