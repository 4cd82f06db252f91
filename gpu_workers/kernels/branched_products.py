"""The products of fused blocks with LoRAs: those of other products, and the branches of their projections.

Only forwards with LoRAs use them, so that others take the kernels that they have without. Several LoRAs are one branch
(``branch_stacks``), which is part of a product (``branch_kernels``), or is written first, so that the product adds
itself to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from xditd.gpu_workers.kernels.branch_kernels import can_multiply, multiply_with_branch
from xditd.gpu_workers.kernels.branch_stacks import BranchStacks
from xditd.gpu_workers.kernels.branches import Branch, Branches, Pair, add_branches, joined
from xditd.gpu_workers.kernels.dense_products import add_product, multiply, note_captured
from xditd.gpu_workers.kernels.products import Linear, TensorRows
from xditd.gpu_workers.kernels.stacked_layout import StackedLayout
from xditd.gpu_workers.kernels.static_branches import Place

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
        self.layout: StackedLayout | None = None
        self._last: _Low | None = None

    def linear(self, name: str, rows: slice = slice(None)) -> Branched[Any]:
        return Branched(self._products.linear(name, rows), self._table.at(name, rows))

    def multiply(self, rows: torch.Tensor, linear: Branched[Any], out: torch.Tensor) -> None:
        self._project([rows], linear, out)

    def mlp(self, rows: torch.Tensor, up: Branched[Any], down: Branched[Any], out: torch.Tensor) -> None:
        if not (self._has(up) or self._has(down)):
            self._products.mlp(rows, up.linear, down.linear, out)
            return
        self._project([self._hidden(rows, up)], down, out)
        self._last = None

    def mlp_and_attention(
        self, attended: torch.Tensor, rows: torch.Tensor, up: Branched[Any], second: Branched[Any], out: torch.Tensor
    ) -> None:
        if not (self._has(up) or self._has(second)):
            self._products.mlp_and_attention(attended, rows, up.linear, second.linear, out)
            return
        self._project([attended, self._hidden(rows, up)], second, out)
        self._last = None

    def _has(self, projection: Branched[Any]) -> bool:
        return bool(projection.branches.active if self.layout is None else id(projection.branches) in self.layout.pairs)

    def _pairs(self, branches: Branches, outputs: int) -> list[Pair]:
        if self.layout is None:
            return self._table.stacks.pairs(branches, outputs)
        pair = self.layout.pairs.get(id(branches))
        return [] if pair is None else [pair]

    def _hidden(self, rows: torch.Tensor, up: Branched[Any]) -> torch.Tensor:
        hidden = rows.new_empty(rows.shape[0], up.linear.bias.shape[0])
        self._project([rows], up, hidden, gelu=True)
        self._last = None  # other projections have other rows
        return hidden

    def _project(
        self, parts: list[torch.Tensor], projection: Branched[Any], out: torch.Tensor, *, gelu: bool = False
    ) -> None:
        """Project rows, whose columns are those of ``parts`` side by side, add the branches, and maybe apply GELU."""
        pairs = self._pairs(projection.branches, out.shape[1])
        lows = [self._low(parts, pair) for pair in pairs]
        plain = self._products.plain(projection.linear)
        if plain is not None and not pairs:
            _multiply(parts, plain, out, gelu=gelu)
            return
        if plain is not None and all(pair.up.dtype == out.dtype for pair in pairs):
            _multiply_with_branches(parts, plain, pairs, lows, out, gelu=gelu)
            return
        if plain is not None:
            _multiply(parts, plain, out)
        else:
            self._products.multiply(parts[0] if len(parts) == 1 else torch.cat(parts, 1), projection.linear, out)
        _add(pairs, lows, out)
        if gelu:
            torch.ops.aten.gelu_(out, approximate="tanh")

    def _low(self, parts: list[torch.Tensor], pair: Pair) -> torch.Tensor:
        """Return ``down x`` (rows, rank) with its factors: for projections with the same rows and factors, once."""
        last, rows = self._last, parts[0]
        if last is not None and last.is_of(rows, pair):
            return last.low
        low, at = rows.new_empty(rows.shape[0], pair.down.shape[0], dtype=pair.down.dtype), 0
        for number, each in enumerate(parts):
            down = pair.down[:, at : at + each.shape[1]].t()
            low.addmm_(each.to(low.dtype), down, alpha=pair.alpha, beta=1.0 if number else 0.0)
            at += each.shape[1]
        if pair.scales is not None:
            low.mul_(pair.scales)
        if len(parts) == 1:
            self._last = _Low(weakref.ref(rows), weakref.ref(pair.down), pair.alpha, pair.scales, low)
        return low


class _Low(NamedTuple):
    """The last ``down x``, without a reference to lent memory."""

    rows: weakref.ref[torch.Tensor]
    down: weakref.ref[torch.Tensor]
    alpha: float
    scales: torch.Tensor | None
    low: torch.Tensor

    def is_of(self, rows: torch.Tensor, pair: Pair) -> bool:
        is_same = self.rows() is rows and self.down() is pair.down
        return is_same and self.alpha == pair.alpha and self.scales is pair.scales


def _add(pairs: Sequence[Pair], lows: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    for pair, low in zip(pairs, lows, strict=True):
        part = out[:, pair.start : pair.start + pair.up.shape[0]]
        if part.dtype == pair.up.dtype:
            part.addmm_(low, pair.up.t())
        else:
            part.add_(torch.mm(low, pair.up.t()))


def _multiply(parts: list[torch.Tensor], plain: Linear, out: torch.Tensor, *, gelu: bool = False) -> None:
    if len(parts) == 1:
        multiply(parts[0], plain.weight, plain.bias, gelu=gelu, out=out)
        return
    width = parts[0].shape[1]
    multiply(parts[0], plain.weight[:width], plain.bias, out=out)
    _add_parts(parts[1:], plain.weight[width:], out, gelu=gelu)


def _multiply_with_branches(
    parts: list[torch.Tensor],
    plain: Linear,
    pairs: Sequence[Pair],
    lows: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    gelu: bool,
) -> None:
    """Do it in one kernel, or write the branches first, so that products add themselves to them in their epilogue."""
    is_first_whole = pairs[0].up.shape[0] == out.shape[1]
    up, low = pairs[0].up, lows[0]
    if len(pairs) == len(parts) == 1 and is_first_whole and can_multiply(parts[0], plain.weight, plain.bias, up, out):
        note_captured(parts[0], plain.weight, plain.bias, low, up)
        multiply_with_branch(parts[0], plain.weight, plain.bias, low, up, out, gelu=gelu)
        return
    if is_first_whole:
        torch.addmm(plain.bias, low, up.t(), out=out)
        _add(pairs[1:], lows[1:], out)
    else:
        out.copy_(plain.bias)
        _add(pairs, lows, out)
    _add_parts(parts, plain.weight, out, gelu=gelu)


def _add_parts(parts: list[torch.Tensor], weight: torch.Tensor, out: torch.Tensor, *, gelu: bool) -> None:
    at = 0
    for number, each in enumerate(parts):
        add_product(each, weight[at : at + each.shape[1]], out, gelu=gelu and number == len(parts) - 1)
        at += each.shape[1]


def with_branches(matrices: Matrices, branches: Sequence[Branches]) -> Matrices:
    """Return matrices that also have branches, each its own."""

    def multiply(vectors: torch.Tensor, rows: int) -> torch.Tensor:
        found = matrices(vectors, rows)
        for number, each in enumerate(branches):
            add_branches(each.active, found[:, number], vectors)
        return found

    return multiply
