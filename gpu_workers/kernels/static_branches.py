"""The branches of a job's LoRAs in memory that stays where it is, so that a CUDA graph serves other LoRAs as well.

A *layout* says which projections have branches, and of which rank. All LoRAs of one layout are copied into the same
memory, one after the other, and strengths with them. So a graph that reads this memory depends on the layout alone.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch

from xditd.gpu_workers.kernels.branches import Branch, Branches, Strength
from xditd.gpu_workers.kernels.factor_copies import FactorCopies

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 2**32
"""Bytes of all layouts of one model; those that were used longest ago go first."""
MAX_SHARE: Final = 32
"""They take at most this fraction, one by so much, of the memory of a GPU."""
MAX_LAYOUTS: Final = 4
_MAX_PLANS: Final = 64
"""Combinations of LoRAs of which a layout knows how they are copied: some hundred KB each."""

_serials = itertools.count(1)

Loras = tuple[tuple[int, float], ...]
"""The numbers of LoRAs of a model with their strengths, none of which is 0."""


class Place(NamedTuple):
    """A projection that may have branches, and the number of its outputs."""

    branches: Branches
    outputs: int


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


class CopyPlan(NamedTuple):
    """How the factors of some LoRAs get into a layout; a factor of strength is a LoRA's number and its scale."""

    copies: FactorCopies
    scales: list[tuple[int, float]]


class StaticLayout:
    """The memory of one layout. ``serial`` is that of no other one. ``title`` is its name in reports.

    A subclass says what is where. All tensors of one layout have one dtype.

    Raises:
        torch.OutOfMemoryError: there is no room for it.
    """

    title = ""

    def __init__(self, shapes: Sequence[Any], places: Sequence[Place], like: torch.Tensor) -> None:
        self.serial = next(_serials)
        self.users: set[int] = set()
        """The numbers of LoRAs that were copied into it and are still lent."""
        self._holds: Loras | None = None
        self._plans: dict[tuple[int, ...], CopyPlan] = {}
        with torch.inference_mode(mode=False):  # so that it can be written to in every mode
            self.memory = torch.zeros(self.numbers(shapes, places), dtype=like.dtype, device=like.device)
            self.cut(self.memory, shapes, places)

    @classmethod
    def find(cls, places: Sequence[Place]) -> tuple[Any, ...] | str:
        """Return the shapes of the LoRAs that are switched on, which name a layout, or why they have none.

        The same on all ranks; each shape has the number of a place as its first item.
        """
        raise NotImplementedError

    @classmethod
    def numbers(cls, shapes: Sequence[Any], places: Sequence[Place]) -> int:
        """Return how many numbers the factors of these shapes are."""
        raise NotImplementedError

    def cut(self, memory: torch.Tensor, shapes: Sequence[Any], places: Sequence[Place]) -> None:
        """Give each shape its part of the memory."""
        raise NotImplementedError

    def plan(self, shapes: Sequence[Any], places: Sequence[Place]) -> CopyPlan:
        """Return how the factors of the LoRAs that are switched on are copied."""
        raise NotImplementedError

    def copy(self, plan: CopyPlan, factors: Sequence[float], *, only_strengths: bool) -> int:
        """Copy factors, or what depends on strengths alone; return the bytes that were read."""
        raise NotImplementedError

    def switched_on(self) -> AbstractContextManager[None]:
        """Let layers of a module add these branches while the context lasts, whichever LoRAs are switched on."""
        raise NotImplementedError

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward with these branches, also where no LoRA is switched on."""

        def run(given: Any) -> Any:
            with self.switched_on():
                return forward(given)

        return run

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def knows(self, loras: Loras) -> bool:
        """Return whether it knows how these LoRAs are copied."""
        return numbers_in(loras) in self._plans

    def fill(self, loras: Loras, shapes: Sequence[Any], places: Sequence[Place], counts: StaticCounts) -> None:
        """Copy the factors of LoRAs that are switched on, unless they are there. ``shapes`` are those of the layout."""
        if loras == self._holds:
            return
        numbers, before = numbers_in(loras), None if self._holds is None else numbers_in(self._holds)
        plan = self._plans.pop(numbers, None)
        if plan is None:
            plan = self.plan(shapes, places)
            while len(self._plans) >= _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
        self._plans[numbers] = plan
        self._holds = None  # until all is copied
        strengths = dict(loras)
        factors = [scale * strengths[number] for number, scale in plan.scales]
        counts.copies += 1
        counts.copied_bytes += self.copy(plan, factors, only_strengths=numbers == before)
        self._holds = loras


LayoutT = TypeVar("LayoutT", bound=StaticLayout)


class StaticBranches(Generic[LayoutT]):
    """The layouts of one model, of one ``kind``, within :data:`MAX_LAYOUTS` and ``max_bytes`` (:func:`room_on`).

    ``agree`` says whether all ranks that run a forward together agree; all of them make the same calls. ``forget`` is
    called with the serial of a layout that goes, whose graphs have to go, too.
    """

    def __init__(
        self,
        kind: type[LayoutT],
        places: Sequence[Place],
        agree: Callable[[bool], bool],
        forget: Callable[[int], None],
        max_bytes: int | None = None,
        counts: StaticCounts | None = None,
    ) -> None:
        self.counts = counts or StaticCounts()
        self._kind = kind
        self._places = places
        self._agree = agree
        self._forget = forget
        self._max_bytes = max_bytes
        self._layouts: dict[tuple[Any, ...], LayoutT] = {}
        self._shapes: dict[tuple[int, ...], tuple[Any, ...] | str] = {}
        """The layout of each combination of LoRAs, or why it has none."""
        self._watched: dict[int, weakref.ref[Strength]] = {}
        self._last: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all layouts."""
        return sum(each.nbytes for each in self._layouts.values())

    def use(self, loras: Loras) -> LayoutT | None:
        """Return the layout of the LoRAs that are switched on, with their factors; ``None`` if they have none.

        ``counts.refusal`` says why then. ``loras`` are those with a strength, in the order of their branches.
        """
        numbers = numbers_in(loras)
        shapes = self._shapes.pop(numbers, None)
        if shapes is None:
            shapes = self._find_shapes()
            while len(self._shapes) >= MAX_LAYOUTS * _MAX_PLANS:
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

    def _find_shapes(self) -> tuple[Any, ...] | str:
        found = self._kind.find(self._places)
        if isinstance(found, str):
            return found
        needed, room = self._bytes_of(found), self._room_for(found)
        if needed > room:
            return f"factors of {needed / 2**30:.1f} GiB, graphs have up to {room / 2**30:.1f}"
        return found

    def _room_for(self, shapes: tuple[Any, ...]) -> int:
        return room_on(self._like(shapes).device) if self._max_bytes is None else self._max_bytes

    def _bytes_of(self, shapes: tuple[Any, ...]) -> int:
        return self._kind.numbers(shapes, self._places) * self._like(shapes).itemsize

    def _like(self, shapes: tuple[Any, ...]) -> torch.Tensor:
        return active_of(self._places[shapes[0][0]])[0].up

    def _make(self, shapes: tuple[Any, ...]) -> LayoutT | None:
        needed, room = self._bytes_of(shapes), self._room_for(shapes)
        while self._layouts and (len(self._layouts) >= MAX_LAYOUTS or self.nbytes + needed > room):
            self._forget(self._layouts.pop(next(iter(self._layouts))).serial)
        try:
            layout = self._kind(shapes, self._places, self._like(shapes))
        except torch.OutOfMemoryError:
            layout = None
        if not self._agree(layout is not None) or layout is None:
            return None
        self.counts.layouts += 1
        logger.info("memory for factors layout=%r mib=%.0f", layout.title, layout.nbytes / 2**20)
        return layout

    def _note_users(self, layout: LayoutT) -> None:
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


def room_on(device: torch.device) -> int:
    """Return how many bytes the layouts of one model may take on a device."""
    if device.type != "cuda":
        return MAX_BYTES
    return min(MAX_BYTES, torch.cuda.get_device_properties(device).total_memory // MAX_SHARE)


def numbers_in(loras: Loras) -> tuple[int, ...]:
    return tuple(number for number, _ in loras)


def active_of(place: Place) -> list[Branch]:
    """Return the branches of a projection that add something."""
    return [each for each in place.branches.active if each.scale * each.strength.value != 0.0]
