"""Lend the LoRAs of the MODELs or CLIPs of one component, and name them to its jobs with their strengths.

A LoRA is lent once and kept while a MODEL uses it, so a change of strength, or between LoRAs of two MODELs, lends
nothing. It is freed at the first use after its last MODEL has gone, or when ComfyUI unloads the component.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xditd.client.comfyui.lora_patches import Factors, FoundLora, Key, find_loras
from xditd.ipc.errors import Unsupported, XditdError
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import ComponentKind

if TYPE_CHECKING:
    from xditd.client.client import Client
    from xditd.client.loans import Loan, LoanWithLoras

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Lent:
    """A lent LoRA; ``holders`` are the MODELs that have been loaded with it."""

    lora: FoundLora
    loan: Loan
    holders: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


class LentLoras:
    """The LoRAs that are lent for one component. Not thread-safe, like ComfyUI's execution."""

    def __init__(self, connect: Callable[[], Client], kind: ComponentKind, label: str) -> None:
        self._connect = connect
        self._part: Any = "text_encoder" if kind is ComponentKind.TEXT_ENCODER else "model"
        self._label = label
        self._lent: dict[Key, _Lent] = {}
        self._uses: list[tuple[_Lent, float]] = []
        self._hooked: list[tuple[_Lent, float]] = []

    def use(self, loan: Loan, branches: Mapping[str, Sequence[Factors]], holder: object) -> None:
        """Use the LoRAs of ``holder``, a MODEL or CLIP, from now on; ``branches`` are their factors by weight.

        Lends those that are not lent, and returns those that no living MODEL uses.

        Raises:
            Unsupported: the workers' model lacks a layer.
        """
        self._uses, self._hooked = self._found(loan, branches, holder), []
        for key, lent in list(self._lent.items()):
            if not lent.holders:
                del self._lent[key]
                _return(lent, self._label)

    def use_hooked(self, loan: Loan, branches: Mapping[str, Sequence[Factors]], holder: object) -> None:
        """Use the LoRAs of hooks, too, until the next call or the next :meth:`use`.

        Raises:
            Unsupported: the workers' model lacks a layer.
        """
        self._hooked = self._found(loan, branches, holder)

    def drop_hooked(self) -> None:
        """Use the LoRAs of hooks no longer; they stay lent."""
        self._hooked = []

    def added_to(self, loan: Loan) -> Loan | LoanWithLoras:
        """Return a loan with the LoRAs in use, for a job; lends them again after a restart of the daemon."""
        uses = [*self._uses, *self._hooked]
        if not uses:
            return loan
        for lent, _ in uses:
            if not lent.loan.is_live:
                lent.loan = self._lend(lent.lora, loan)
        return loan.with_loras([(lent.loan, strength) for lent, strength in uses])

    def release(self) -> None:
        """Return all LoRAs. The next use lends them again."""
        self._uses, self._hooked = [], []
        while self._lent:
            _return(self._lent.popitem()[1], self._label)

    def _found(
        self, loan: Loan, branches: Mapping[str, Sequence[Factors]], holder: object
    ) -> list[tuple[_Lent, float]]:
        """Return the LoRAs of these factors with their strengths; lend those that are not lent."""
        uses = []
        for found in find_loras(branches, self._part):
            lent = self._lent.get(found.key)
            if lent is None:
                lent = self._lent[found.key] = _Lent(found, self._lend(found, loan))
            lent.holders.add(holder)
            uses.append((lent, found.strength))
        return uses

    def _lend(self, found: FoundLora, loan: Loan) -> Loan:
        lent = self._connect().lend_lora(found.read, label=f"LoRA of {self._label}")
        facts = lent.facts.lora
        if facts is None or facts.families.get(loan.family, 0) < len(found.read.layers):
            lent.return_()
            unknown = () if facts is None else facts.unknown
            raise Unsupported(
                f"{self._label}: a LoRA is of layers that the workers' {loan.family} does not have "
                f"({listed(unknown)}); remove the LoRA's node",
                names=list(unknown),
            )
        logger.info(
            "LoRA lent label=%s layers=%d bytes=%d tiers=%s",
            self._label, len(found.read.layers), lent.lent_bytes, "+".join(tier.value for tier in lent.tiers),
        )  # fmt: skip
        return lent


def _return(lent: _Lent, label: str) -> None:
    try:
        lent.loan.return_()
    except XditdError as error:
        logger.warning("LoRA not returned label=%s reason=%s", label, error)
