"""The loans of a module's adapters, and which of them a call names with which strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from xditd.client.class_modules import lend_factors
from xditd.client.client import Client
from xditd.client.diffusers.adapters import Adapters, Scales
from xditd.client.diffusers.shallow_record import Content
from xditd.client.loans import Loan
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.loras import MAX_SCALE, LoraPart

MAX_IDLE: Final = 8
"""Loans that stay beside those of the last call, so that it costs nothing to use them again."""

_EXACT: Final = 1e-12
"""The relative difference of scales that are the same: the last places of float64."""


@dataclass(frozen=True, eq=False)
class _Held:
    """A loan of an adapter's factors with these scales."""

    loan: Loan
    name: str
    scales: Mapping[str, float]
    contents: Mapping[str, tuple[Content, Content]]


class AdapterLoans:
    """Lends the adapters of one module. Not safe for several threads: the caller holds a lock.

    The factors are lent with the scales alpha / rank, so that the weight of an adapter is a strength, which is sent
    with each call. Scales that differ from block to block are lent as they are.
    """

    def __init__(self, client: Client, label: str, part: LoraPart) -> None:
        self._client = client
        self._label = label
        self._part = part
        self._held: list[_Held] = []
        """Those that were used last come last."""
        self.lends = 0

    @property
    def loans(self) -> list[Loan]:
        """All loans."""
        return [each.loan for each in self._held]

    def uses(self, adapters: Adapters, scales: Scales, times: float) -> tuple[LoraUse, ...]:
        """Return what a call has to name: the active adapters with ``times`` their scales; lends what is not yet lent.

        Raises:
            XditdError: as ``Client.lend_lora``.
        """
        self._held = [each for each in self._held if each.loan.is_live]
        found: list[tuple[_Held, float]] = []
        for name, by_path in scales.items():
            if not any(by_path.values()) or times == 0.0:
                continue
            wanted = {path: by_path.get(path, 0.0) for path in adapters.contents[name]}
            held, strength = self._find(name, adapters, wanted) or self._lend(name, adapters, wanted)
            self._held.remove(held)
            self._held.append(held)
            found.append((held, strength * times))
        self._drop_idle(len(found))
        return tuple(LoraUse(component_id=held.loan.component_id, strength=strength) for held, strength in found)

    def keep_only(self, adapters: Adapters) -> None:
        """Return the loans of adapters that are gone, or have other factors."""
        gone = [each for each in self._held if adapters.contents.get(each.name) != each.contents]
        self._held = [each for each in self._held if each not in gone]
        _return(gone)

    def return_all(self) -> None:
        """Return all loans."""
        held, self._held = self._held, []
        _return(held)

    def _find(self, name: str, adapters: Adapters, wanted: Mapping[str, float]) -> tuple[_Held, float] | None:
        for held in reversed(self._held):
            if held.name == name and held.contents == adapters.contents[name]:
                strength = _ratio(wanted, held.scales)
                if strength is not None:
                    return held, strength
        return None

    def _lend(self, name: str, adapters: Adapters, wanted: Mapping[str, float]) -> tuple[_Held, float]:
        scales: Mapping[str, float] = adapters.first_scales(name)
        strength = _ratio(wanted, scales)
        if strength is None:
            scales, strength = wanted, 1.0
        factors = {path: (*pair, scales[path]) for path, pair in adapters.factors(name).items()}
        label = f"{self._label} adapter {name}"
        loan = lend_factors(self._client, factors, label=label[:200], part=self._part, generation=self.lends)
        self.lends += 1
        self._held.append(_Held(loan, name, scales, adapters.contents[name]))
        return self._held[-1], strength

    def _drop_idle(self, used: int) -> None:
        count = len(self._held) - used - MAX_IDLE
        if count > 0:
            dropped, self._held = self._held[:count], self._held[count:]
            _return(dropped)


def _ratio(wanted: Mapping[str, float], scales: Mapping[str, float]) -> float | None:
    """Return by what all ``scales`` have to be multiplied to be those that are wanted; ``None`` if there is no such."""
    first = next((path for path, scale in scales.items() if scale), None)
    if first is None:
        return None if any(wanted.values()) else 1.0
    ratio = wanted[first] / scales[first]
    if abs(ratio) > MAX_SCALE:
        return None
    is_same = all(abs(wanted[path] - ratio * scale) <= _EXACT * abs(wanted[path]) for path, scale in scales.items())
    return ratio if is_same else None


def _return(held: list[_Held]) -> None:
    for each in held:
        if each.loan.is_live:
            each.loan.return_()
