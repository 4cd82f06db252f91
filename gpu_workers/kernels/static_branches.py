"""The branches of a job's LoRAs in memory that stays where it is, so that a CUDA graph serves other LoRAs as well.

A *layout* says which projections have branches, and of which rank. Ranks are padded to few ones: with zeros, which add
nothing. All LoRAs of one layout are copied into the same memory, one after the other, and strengths with them: they are
factors of the copies of ``down``. So a graph that reads this memory depends on the layout alone.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch

from xditd.gpu_workers.kernels.branch_stacks import Pair
from xditd.gpu_workers.kernels.branches import Branch, Branches, Strength
from xditd.gpu_workers.kernels.factor_copies import Copy, FactorCopies

logger = logging.getLogger(__name__)

RANKS: Final = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""The ranks to which the sum of ranks at a projection is padded."""
MAX_BYTES: Final = 2**31
"""Bytes of all layouts of one model; those that were used longest ago go first."""
MAX_LAYOUTS: Final = 4
_MAX_COPIES: Final = 64
"""Combinations of LoRAs of which a layout knows how they are copied: some hundred KB each."""

_serials = itertools.count(1)

Loras = tuple[tuple[int, float], ...]
"""The numbers of LoRAs of a model with their strengths, none of which is 0."""


class Place(NamedTuple):
    """A projection that may have branches, and the number of its outputs."""

    branches: Branches
    outputs: int


class _Shape(NamedTuple):
    """The pair of a projection: its number, its rank, its inputs, and the first projection with the same ``down``."""

    place: int
    rank: int
    inputs: int
    first: int


class StaticCounts:
    """What was done to the branches of one model since it was built."""

    def __init__(self) -> None:
        self.layouts = 0
        """Layouts that were made: each has graphs of its own."""
        self.copies = 0
        """Switches to other LoRAs or strengths, by copies of factors."""
        self.copied_bytes = 0
        self.forwards = 0
        """Forwards with LoRAs."""
        self.launched = 0
        """Those among them that were graphs."""
        self.refusal = ""
        """Why the last combination of LoRAs that was used has no layout; empty if it has one."""


class StaticLayout:
    """The memory of one layout. ``serial`` is that of no other one; ``pairs`` are by the ids of places' branches.

    Raises:
        torch.OutOfMemoryError: there is no room for it.
    """

    def __init__(self, shapes: Sequence[_Shape], places: Sequence[Place], like: torch.Tensor) -> None:
        self.serial = next(_serials)
        self.ranks = tuple(sorted({each.rank for each in shapes}))
        self.pairs: dict[int, Pair] = {}
        self.users: set[int] = set()
        """The numbers of LoRAs that were copied into it and are still lent."""
        self._holds: Loras | None = None
        self._copies: dict[tuple[int, ...], tuple[FactorCopies, list[tuple[int, float]]]] = {}
        with torch.inference_mode(mode=False):  # so that it can be written to in every mode
            self._memory = torch.zeros(numbers_of(shapes, places), dtype=like.dtype, device=like.device)
            self._cut(shapes, places)

    def _cut(self, shapes: Sequence[_Shape], places: Sequence[Place]) -> None:
        at, downs = 0, dict[int, torch.Tensor]()
        for shape in shapes:
            sizes = [(places[shape.place].outputs, shape.rank)]
            if shape.first == shape.place:
                sizes.append((shape.rank, shape.inputs))
            parts = []
            for rows, columns in sizes:
                parts.append(self._memory[at : at + rows * columns].view(rows, columns))
                at += rows * columns
            up = parts[0]
            if len(parts) == 2:
                downs[shape.place] = parts[1]
            self.pairs[id(places[shape.place].branches)] = Pair(downs[shape.first], up, 0, 1.0)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def knows(self, loras: Loras) -> bool:
        """Whether it knows how these LoRAs are copied."""
        return tuple(number for number, _ in loras) in self._copies

    def fill(self, loras: Loras, shapes: Sequence[_Shape], places: Sequence[Place], counts: StaticCounts) -> None:
        """Copy the factors of LoRAs that are switched on, unless they are there. ``shapes`` are those of the layout."""
        if loras == self._holds:
            return
        numbers = tuple(number for number, _ in loras)
        before = None if self._holds is None else tuple(number for number, _ in self._holds)
        known = self._copies.pop(numbers, None)
        if known is None:
            known = self._plan_copies(shapes, places)
            while len(self._copies) >= _MAX_COPIES:
                del self._copies[next(iter(self._copies))]
        self._copies[numbers] = known
        copies, scales = known
        self._holds = None  # until all is copied
        if numbers != before:
            self._memory.zero_()
        strengths = dict(loras)
        factors = [scale * strengths[number] for number, scale in scales]
        counts.copies += 1
        counts.copied_bytes += copies.run(factors, only_scaled=numbers == before)
        self._holds = loras

    def _plan_copies(
        self, shapes: Sequence[_Shape], places: Sequence[Place]
    ) -> tuple[FactorCopies, list[tuple[int, float]]]:
        """Return the copies of the LoRAs that are switched on, and of each factor the LoRA's number and its scale."""
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
        return FactorCopies(copies), list(scales)


class StaticBranches:
    """The layouts of one model, within :data:`MAX_BYTES` and :data:`MAX_LAYOUTS`.

    ``agree`` says whether all ranks that run a forward together agree; all of them make the same calls. ``forget`` is
    called with the serial of a layout that goes, whose graphs have to go, too.
    """

    def __init__(
        self,
        places: Sequence[Place],
        agree: Callable[[bool], bool],
        forget: Callable[[int], None],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.counts = StaticCounts()
        self._places = places
        self._agree = agree
        self._forget = forget
        self._max_bytes = max_bytes
        self._layouts: dict[tuple[_Shape, ...], StaticLayout] = {}
        self._shapes: dict[tuple[int, ...], tuple[_Shape, ...] | str] = {}
        """The layout of each combination of LoRAs, or why it has none."""
        self._watched: dict[int, weakref.ref[Strength]] = {}
        self._last: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all layouts."""
        return sum(each.nbytes for each in self._layouts.values())

    def use(self, loras: Loras) -> StaticLayout | None:
        """Return the layout of the LoRAs that are switched on, with their factors; ``None`` if they have none.

        ``counts.refusal`` says why then. ``loras`` are those with a strength, in the order of their branches.
        """
        numbers = tuple(number for number, _ in loras)
        shapes = self._shapes.pop(numbers, None)
        if shapes is None:
            shapes = self._find_shapes()
            while len(self._shapes) >= MAX_LAYOUTS * _MAX_COPIES:
                del self._shapes[next(iter(self._shapes))]
        self._shapes[numbers] = shapes
        if isinstance(shapes, str):
            self.counts.refusal = shapes
            return None
        layout = self._layouts.pop(shapes, None)
        if numbers != self._last and not self._agree(layout is not None):
            if layout is not None:  # ranks with and without it would not take the same path
                self._forget(layout.serial)
            layout = self._make(shapes)
        self._last = numbers
        if layout is None:
            self._shapes[numbers] = self.counts.refusal = "the GPU has no room for their factors"
            return None
        self._layouts[shapes] = layout  # last: used most recently
        if not layout.knows(loras):
            self._note_users(layout)
        layout.fill(loras, shapes, self._places, self.counts)
        self.counts.refusal = ""
        return layout

    def clear(self) -> None:
        """Free all layouts, and their graphs."""
        for layout in self._layouts.values():
            self._forget(layout.serial)
        self._layouts, self._shapes, self._last = {}, {}, ()

    def _find_shapes(self) -> tuple[_Shape, ...] | str:
        """Return the layout of the LoRAs that are switched on, or why they have none: the same on all ranks."""
        found: list[_Shape] = []
        firsts: dict[tuple[int, ...], int] = {}
        for number, place in enumerate(self._places):
            active = active_of(place)
            if not active:
                continue
            rank = sum(each.down.shape[0] for each in active)
            padded = next((each for each in RANKS if each >= rank), None)
            if padded is None:
                return f"ranks of LoRAs sum up to {rank}, graphs have up to {RANKS[-1]}"
            if len({each.up.dtype for each in active}) > 1:
                return "factors of several dtypes"
            first = firsts.setdefault(tuple(id(each.down) for each in active), number)
            found.append(_Shape(number, padded, active[0].down.shape[1], first))
        if not found:
            return "no LoRA has layers of blocks"
        like = active_of(self._places[found[0].place])[0].up
        needed = numbers_of(found, self._places) * like.itemsize
        if needed > self._max_bytes:
            return f"factors of {needed / 2**30:.1f} GiB, graphs have up to {self._max_bytes / 2**30:.1f}"
        return tuple(found)

    def _make(self, shapes: tuple[_Shape, ...]) -> StaticLayout | None:
        like = active_of(self._places[shapes[0].place])[0].up
        needed = numbers_of(shapes, self._places) * like.itemsize
        while self._layouts and (len(self._layouts) >= MAX_LAYOUTS or self.nbytes + needed > self._max_bytes):
            self._forget(self._layouts.pop(next(iter(self._layouts))).serial)
        try:
            layout = StaticLayout(shapes, self._places, like)
        except torch.OutOfMemoryError:
            layout = None
        if not self._agree(layout is not None) or layout is None:
            return None
        self.counts.layouts += 1
        logger.info("memory for factors of LoRAs ranks=%s mib=%.0f", layout.ranks, layout.nbytes / 2**20)
        return layout

    def _note_users(self, layout: StaticLayout) -> None:
        """Free the layout once none of the LoRAs that used it is lent any more."""
        strengths = {each.strength for place in self._places for each in active_of(place)}
        mine = weakref.ref(self)
        for strength in strengths:
            number = strength.number
            layout.users.add(number)
            if number in self._watched:
                continue

            def drop(_: weakref.ref[Strength], number: int = number) -> None:
                found = mine()
                if found is not None:
                    found._watched.pop(number, None)
                    found._drop_user(number)

            self._watched[number] = weakref.ref(strength, drop)

    def _drop_user(self, number: int) -> None:
        for shapes, layout in list(self._layouts.items()):
            layout.users.discard(number)
            if not layout.users:
                del self._layouts[shapes]
                self._forget(layout.serial)


def numbers_of(shapes: Sequence[_Shape], places: Sequence[Place]) -> int:
    """Return how many numbers the factors of a layout are."""
    return sum(
        each.rank * (places[each.place].outputs + (each.inputs if each.first == each.place else 0)) for each in shapes
    )


def active_of(place: Place) -> list[Branch]:
    """Return the branches of a projection that add something."""
    return [each for each in place.branches.active if each.scale * each.strength.value != 0.0]
