"""The branches of a module that runs as its class in memory that graphs read: computed as by PEFT, with its bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch

from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES
from xditd.gpu_workers.kernels.factor_copies import Copy, FactorCopies
from xditd.gpu_workers.kernels.static_branches import (
    CopyPlan,
    Loras,
    Place,
    StaticBranches,
    StaticCounts,
    StaticLayout,
    active_of,
)
from xditd.gpu_workers.models.class_branches import LayerBranches, StaticBranch
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.parallel.rank_sync import agree

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
        self._factors.copy_(torch.tensor(factors, dtype=torch.float32))
        return 0 if only_strengths else plan.copies.run(())

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Let the layers add these branches while the context lasts, whichever LoRAs are switched on."""
        before = [(branches, branches.static) for branches, _ in self._parts]
        try:
            for branches, parts in self._parts:
                branches.static = parts
            yield
        finally:
            for branches, parts in before:
                branches.static = parts

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward with these branches, also where no LoRA is switched on."""

        def run(given: Any) -> Any:
            with self.switched_on():
                return forward(given)

        return run


class ClassLoras:
    """The LoRAs of one module, whose forwards have ``paths``. All ranks of the group make the same calls."""

    def __init__(self, places: Callable[[], Sequence[Place]], paths: ForwardPaths) -> None:
        self._places = places
        self._paths = paths
        self._static: StaticBranches[SeparateLayout] | None = None
        self.counts = StaticCounts()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that graphs read."""
        return 0 if self._static is None else self._static.nbytes

    @property
    def detail(self) -> str:
        """Why forwards with LoRAs take another path than others; empty if they do not."""
        if not self._paths.is_on:
            return ""
        if not self._paths.captures:
            return "forwards with LoRAs are eager: compiled blocks have no branches"
        if self.counts.refusal:
            return f"forwards with LoRAs are eager: {self.counts.refusal}"
        return "compiled blocks have no branches: forwards with LoRAs may be captured alone" * self._paths.compiles

    def use(self, loras: Loras, forwards: int) -> SeparateLayout | None:
        """Return the layout of the LoRAs that are switched on, with their factors; ``None`` if forwards are eager.

        ``forwards`` is their number, which counts.
        """
        if not loras:
            return None
        self.counts.forwards += forwards
        if not self._paths.captures:
            return None
        if self._static is None:
            places = self._places()
            self._static = StaticBranches(SeparateLayout, places, agree, self._paths.forget, counts=self.counts)
        return self._static.use(loras)

    def clear(self) -> None:
        """Free the memory for factors, and the graphs that read it."""
        if self._static is not None:
            self._static.clear()


def _sizes(part: _Part) -> tuple[int, int]:
    down, up = part.rank * part.inputs, part.rows * part.rank
    return -(-down // _ALIGNMENT) * _ALIGNMENT, -(-up // _ALIGNMENT) * _ALIGNMENT
