"""Branches of a projection as one pair of factors, of a padded rank, in memory that graphs read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch

from xditd.gpu_workers.kernels.branches import Pair
from xditd.gpu_workers.kernels.factor_copies import Copy, FactorCopies
from xditd.gpu_workers.kernels.static_branches import CopyPlan, Place, StaticLayout, active_of

RANKS: Final = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""The ranks to which the sum of ranks at a projection is padded."""


class StackShape(NamedTuple):
    """The pair of a projection: its number, its rank, its inputs, and the first projection with the same ``down``."""

    place: int
    rank: int
    inputs: int
    first: int


class StackedLayout(StaticLayout):
    """The pairs of projections: ``pairs``, by the ids of the places' branches.

    Ranks are padded by zeros, which add nothing. Strengths and scales are factors of the copies of ``down``, so that
    they cost no kernel in a forward.
    """

    @classmethod
    def find(cls, places: Sequence[Place]) -> tuple[StackShape, ...] | str:
        found: list[StackShape] = []
        firsts: dict[tuple[int, ...], int] = {}
        dtypes: set[torch.dtype] = set()
        for number, place in enumerate(places):
            active = active_of(place)
            if not active:
                continue
            rank = sum(each.down.shape[0] for each in active)
            padded = next((each for each in RANKS if each >= rank), None)
            if padded is None:
                return f"ranks of LoRAs sum up to {rank}, graphs have up to {RANKS[-1]}"
            dtypes |= {each.up.dtype for each in active}
            if len(dtypes) > 1:
                return "factors of several dtypes"
            first = firsts.setdefault(tuple(id(each.down) for each in active), number)
            found.append(StackShape(number, padded, active[0].down.shape[1], first))
        return tuple(found) if found else "no LoRA has layers of blocks"

    @classmethod
    def numbers(cls, shapes: Sequence[StackShape], places: Sequence[Place]) -> int:
        return sum(
            each.rank * (places[each.place].outputs + (each.inputs if each.first == each.place else 0))
            for each in shapes
        )

    def cut(self, memory: torch.Tensor, shapes: Sequence[StackShape], places: Sequence[Place]) -> None:
        self.title = f"LoRAs of rank {', '.join(map(str, sorted({each.rank for each in shapes})))}"
        self.pairs: dict[int, Pair] = {}
        self._branches = [places[each.place].branches for each in shapes]
        at, downs = 0, dict[int, torch.Tensor]()
        for shape in shapes:
            sizes = [(places[shape.place].outputs, shape.rank)]
            if shape.first == shape.place:
                sizes.append((shape.rank, shape.inputs))
            parts = []
            for rows, columns in sizes:
                parts.append(memory[at : at + rows * columns].view(rows, columns))
                at += rows * columns
            if len(parts) == 2:
                downs[shape.place] = parts[1]
            self.pairs[id(places[shape.place].branches)] = Pair(downs[shape.first], parts[0], 0, 1.0)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        before = [(branches, branches.pair) for branches in self._branches]
        try:
            for branches in self._branches:
                branches.pair = self.pairs[id(branches)]
            yield
        finally:
            for branches, pair in before:
                branches.pair = pair

    def plan(self, shapes: Sequence[StackShape], places: Sequence[Place]) -> CopyPlan:
        copies: list[Copy] = []
        scales: dict[tuple[int, float], int] = {}
        for shape in shapes:
            pair, at = self.pairs[id(places[shape.place].branches)], 0
            for each in active_of(places[shape.place]):
                rank = each.down.shape[0]
                copies.append(Copy(each.up, pair.up[each.start : each.stop, at : at + rank]))
                if shape.first == shape.place:
                    number = scales.setdefault((each.strength.number, each.scale), len(scales) + 1)
                    copies.append(Copy(each.down, pair.down[at : at + rank], number))
                at += rank
        return CopyPlan(FactorCopies(copies), list(scales))

    def copy(self, plan: CopyPlan, factors: Sequence[float], *, only_strengths: bool) -> int:
        if not only_strengths:
            self.memory.zero_()  # what lies beside these factors may be that of others
        return plan.copies.run(factors, only_scaled=only_strengths)
