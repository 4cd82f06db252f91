"""The branches of a module that runs as its class in memory that graphs read: computed as by PEFT, with its bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch

from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES
from xditd.gpu_workers.kernels.factor_copies import Copy, FactorCopies
from xditd.gpu_workers.kernels.static_branches import CopyPlan, Place, StaticLayout, active_of
from xditd.gpu_workers.models.class_branches import LayerBranches, StaticBranch

_ALIGNMENT: Final = 64
"""Numbers; torch's own tensors begin at multiples of 512 bytes, and kernels are chosen by that."""


class _Part(NamedTuple):
    rank: int
    inputs: int
    rows: int
    start: int


class _Shape(NamedTuple):
    """The branches of a layer: its number, one part for each, and their dtype."""

    place: int
    parts: tuple[_Part, ...]
    dtype: torch.dtype


class SeparateLayout(StaticLayout):
    """The factors of each LoRA by themselves, in their own ranks: padded ones could have other bits than PEFT's."""

    @classmethod
    def find(cls, places: Sequence[Place]) -> tuple[_Shape, ...] | str:
        found: list[_Shape] = []
        dtypes = {
            each.dtype for place in places for branch in place.branches.active for each in (branch.down, branch.up)
        }
        if len(dtypes) > 1:
            return "factors of several dtypes"
        if dtypes - {torch.float32, *HALF_DTYPES}:
            return f"factors in {dtypes.pop()}"
        for number, place in enumerate(places):
            active = active_of(place)
            if active and not isinstance(place.branches, LayerBranches):
                return "layers with packed weights add their branches kernel by kernel"
            parts = tuple(
                _Part(each.down.shape[0], each.down.shape[1], each.up.shape[0], each.start) for each in active
            )
            if parts:
                found.append(_Shape(number, parts, active[0].up.dtype))
        return tuple(found) if found else "no LoRA has layers of the module"

    @classmethod
    def numbers(cls, shapes: Sequence[_Shape], places: Sequence[Place]) -> int:  # noqa: ARG003
        return sum(size for shape in shapes for part in shape.parts for size in _sizes(part))

    def cut(self, memory: torch.Tensor, shapes: Sequence[_Shape], places: Sequence[Place]) -> None:
        ranks = sorted({part.rank for shape in shapes for part in shape.parts})
        self.title = f"LoRAs of rank {', '.join(map(str, ranks[:5]))}"
        count = sum(len(shape.parts) for shape in shapes)
        self._factors = torch.zeros(count, dtype=torch.float32, device=memory.device)
        self._parts: list[tuple[LayerBranches, tuple[StaticBranch, ...]]] = []
        at, number = 0, 0
        for shape in shapes:
            found = []
            for part in shape.parts:
                down_size, up_size = _sizes(part)
                down = memory[at : at + part.rank * part.inputs].view(part.rank, part.inputs)
                at += down_size
                up = memory[at : at + part.rows * part.rank].view(part.rows, part.rank)
                at += up_size
                found.append(StaticBranch(down, up, self._factors[number], part.start))
                number += 1
            branches = places[shape.place].branches
            assert isinstance(branches, LayerBranches)
            self._parts.append((branches, tuple(found)))

    def plan(self, shapes: Sequence[_Shape], places: Sequence[Place]) -> CopyPlan:
        copies: list[Copy] = []
        scales: list[tuple[int, float]] = []
        for shape, (_, parts) in zip(shapes, self._parts, strict=True):
            for each, part in zip(active_of(places[shape.place]), parts, strict=True):
                copies += (Copy(each.down, part.down), Copy(each.up, part.up))
                scales.append((each.strength.number, each.scale))
        return CopyPlan(FactorCopies(copies), scales)

    def copy(self, plan: CopyPlan, factors: Sequence[float], *, only_strengths: bool) -> int:
        self._factors.copy_(torch.tensor(factors, dtype=torch.float32), non_blocking=True)
        return 0 if only_strengths else plan.copies.run(())

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        before = [(branches, branches.static) for branches, _ in self._parts]
        try:
            for branches, parts in self._parts:
                branches.static = parts
            yield
        finally:
            for branches, parts in before:
                branches.static = parts


def _sizes(part: _Part) -> tuple[int, int]:
    down, up = part.rank * part.inputs, part.rows * part.rank
    return -(-down // _ALIGNMENT) * _ALIGNMENT, -(-up // _ALIGNMENT) * _ALIGNMENT
