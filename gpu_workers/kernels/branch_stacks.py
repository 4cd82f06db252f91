"""Branches of several LoRAs on one projection as one pair of factors, so that its result is read and written once.

The stacks of a combination of LoRAs are copies of their factors. They are made by its first forward, kept for the next
ones, and freed with the first of these LoRAs that goes. Strengths are no part of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Final

import torch

from xditd.gpu_workers.kernels.branches import Branch, Branches, Pair, Strength

MAX_BYTES: Final = 2**30
"""Bytes of all stacks of one model. A larger combination is added branch by branch."""
_MAX_SCALES: Final = 64
"""Vectors of factors that a combination keeps: one for each step's strengths and each layer's scales."""


class _Combination:
    """The stacks of LoRAs that are used together, by projection."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.is_refused = False
        self._downs: dict[tuple[int, ...], torch.Tensor] = {}
        self._ups: dict[int, torch.Tensor] = {}
        self._scales: dict[tuple[tuple[float, int], ...], torch.Tensor] = {}

    def pair(self, place: Branches, branches: Sequence[Branch], outputs: int, max_bytes: int) -> Pair | None:
        """Return the pair of a projection of so many outputs; ``None`` if there is no memory for it."""
        names = tuple(id(each.down) for each in branches)  # factors live at least as long as their stack
        up = self._ups.get(id(place))
        if up is None:
            if self.is_refused:
                return None
            try:
                up = self._stack(names, branches, outputs, max_bytes)
            except torch.OutOfMemoryError:
                up = None
            if up is None:
                self.is_refused = True
                self._downs, self._ups, self._scales, self.nbytes = {}, {}, {}, 0
                return None
            self._ups[id(place)] = up
        factors = tuple((each.scale * each.strength.value, each.down.shape[0]) for each in branches)
        if len({factor for factor, _ in factors}) == 1:
            return Pair(self._downs[names], up, 0, factors[0][0])
        return Pair(self._downs[names], up, 0, 1.0, self._vector(factors, up.device))

    def _stack(
        self, names: tuple[int, ...], branches: Sequence[Branch], outputs: int, max_bytes: int
    ) -> torch.Tensor | None:
        rank, first = sum(each.down.shape[0] for each in branches), branches[0]
        numbers = rank * (outputs + (0 if names in self._downs else first.down.shape[1]))
        if self.nbytes + numbers * first.up.itemsize > max_bytes:
            return None
        up, at = first.up.new_zeros(outputs, rank), 0
        for each in branches:
            up[each.start : each.stop, at : at + each.up.shape[1]] = each.up
            at += each.up.shape[1]
        if names not in self._downs:
            self._downs[names] = torch.cat([each.down for each in branches])
        self.nbytes += numbers * first.up.itemsize
        return up

    def _vector(self, factors: tuple[tuple[float, int], ...], device: torch.device) -> torch.Tensor:
        found = self._scales.get(factors)
        if found is None:
            if len(self._scales) >= _MAX_SCALES:
                self._scales.pop(next(iter(self._scales)))
            numbers = [factor for factor, rank in factors for _ in range(rank)]
            found = torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
            self._scales[factors] = found
        return found


class BranchStacks:
    """The stacks of one model, by combination of LoRAs, within ``max_bytes``: the least recently used go first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._known: dict[tuple[int, ...], _Combination] = {}
        self._watched: dict[int, weakref.ref[Strength]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks."""
        return sum(each.nbytes for each in self._known.values())

    def pairs(self, place: Branches, outputs: int) -> list[Pair]:
        """Return what the active branches of a projection of so many outputs add to it: one pair, where that can be.

        A LoRA of strength 0 adds nothing, so that beside it others are not stacked.
        """
        branches = place.active
        alone = [
            Pair(each.down, each.up, each.start, factor)
            for each in branches
            if (factor := each.scale * each.strength.value) != 0.0
        ]
        if len(alone) < 2 or len(alone) < len(branches) or len({each.up.dtype for each in alone}) > 1:
            return alone
        pair = self._combination(branches).pair(place, branches, outputs, self._max_bytes)
        self._shrink()
        return alone if pair is None else [pair]

    def _combination(self, branches: Sequence[Branch]) -> _Combination:
        strengths = {id(each.strength): each.strength for each in branches}
        names = tuple(strengths)
        found = self._known.pop(names, None)
        if found is None:
            found = _Combination()
            for name, strength in strengths.items():
                self._watch(name, strength)
        self._known[names] = found  # last: used most recently
        return found

    def _watch(self, name: int, strength: Strength) -> None:
        if name in self._watched:
            return
        stacks = weakref.ref(self)

        def forget(_: weakref.ref[Strength]) -> None:
            mine = stacks()
            if mine is not None:
                mine._watched.pop(name, None)
                mine._known = {names: each for names, each in mine._known.items() if name not in names}

        self._watched[name] = weakref.ref(strength, forget)

    def _shrink(self) -> None:
        while len(self._known) > 1 and self.nbytes > self._max_bytes:
            self._known.pop(next(iter(self._known)))
