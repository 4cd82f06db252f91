"""``Finding``: the result of one check of ``xditd doctor``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Verdict(Enum):
    OK = "ok"
    WARN = "warn"
    """It works with limitations."""
    FAIL = "fail"
    """It does not work."""


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``remedy`` is empty if nothing has to be done; ``notes`` are further details."""

    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""
    notes: tuple[str, ...] = ()

    def as_builtins(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.value}


def ok(check: str, detail: str, notes: tuple[str, ...] = ()) -> Finding:
    return Finding(check, Verdict.OK, detail, notes=notes)


def warn(check: str, detail: str, remedy: str) -> Finding:
    return Finding(check, Verdict.WARN, detail, remedy)


def fail(check: str, detail: str, remedy: str) -> Finding:
    return Finding(check, Verdict.FAIL, detail, remedy)
