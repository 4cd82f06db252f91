"""Run a forward in whose middle ranks meet, so that it returns on all of them, or raises on all of them.

Most of what a plan can find wrong is wrong on every rank at the same place: it follows from the sizes of whole streams.
What depends on a rank's own tensors may be wrong on one rank alone, which raises while the others wait in a collective.
So ranks that are *guarded* tell each other before each collective what it is, and at the end of the forward how it
went: this costs a meeting of the hosts each time, and the first call of each structure of arguments is run so. Later
calls have tensors of the same shapes, so that what could differ between ranks has been seen not to. Where a size
follows from the values of tensors, as among picked tokens, ranks share it before they decide by it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any, Final

from xditd.gpu_workers.models.token_plans import PlanFault
from xditd.gpu_workers.parallel.rank_sync import share_value
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.ipc.errors import OtherRankFailed, XditdError


class _Outcome(IntEnum):
    DONE = 0
    FAULT = 1
    """It is not as the plan declares."""
    ERROR = 2


_VALUES: Final = 256
"""Those that ranks share: outcomes, and digests of collectives."""


class _Apart(PlanFault):
    """All ranks know that they are not at the same place of a forward."""

    def __init__(self, outcome: _Outcome) -> None:
        super().__init__("workers are at different places of the forward, which is not as the plan declares")
        self.outcome = outcome


def run_split(run: Callable[[Ranks], Any], ranks: Ranks, *, is_guarded: bool) -> Any:
    """Run a forward on all ranks.

    Without ``is_guarded``, a rank that raises alone makes the others wait until the leader ends the group.

    Raises:
        PlanFault: on every rank, if it is not as the plan declares on any.
        OtherRankFailed: another rank has raised something else, which it raises there.
    """
    fault: XditdError | None = None
    result = None
    try:
        result = run(replace(ranks, meet=_meet) if is_guarded else ranks)
        outcome = _worst(share_value(_Outcome.DONE))
    except _Apart as apart:
        outcome = apart.outcome
        fault = apart
    except XditdError as error:
        fault = error
        outcome = _worst(share_value(_Outcome.FAULT if isinstance(error, PlanFault) else _Outcome.ERROR))
    if outcome is _Outcome.DONE:
        return result
    is_fault = isinstance(fault, PlanFault)
    if outcome is _Outcome.FAULT:
        raise fault if is_fault and fault else PlanFault("on another worker the forward is not as the plan declares")
    raise OtherRankFailed("another rank refused; its error says why") if is_fault or fault is None else fault


def _meet(what: object) -> None:
    """Wait for the other ranks before a collective.

    Raises:
        _Apart: one has ended its forward, or is at another collective.
    """
    # repr, since the hash of a text differs between processes. Two collectives with one digest are not told apart.
    digest = len(_Outcome) + zlib.crc32(repr(what).encode()) % (_VALUES - len(_Outcome))
    values = share_value(digest)
    if any(each != digest for each in values):
        raise _Apart(_worst(values))


def _worst(values: Sequence[int]) -> _Outcome:
    """Return how a forward went from what all ranks said last."""
    if _Outcome.ERROR in values:
        return _Outcome.ERROR
    return _Outcome.DONE if all(each == _Outcome.DONE for each in values) else _Outcome.FAULT
