"""What a check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum


class Verdict(Enum):
    OK = "ok"
    WARN = "warn"
    """It works, but not as well, or not for everything."""
    FAIL = "fail"
    """It does not work."""


@dataclass(frozen=True)
class Finding:
    """One check. ``remedy`` is empty where there is nothing to do."""

    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""

    def as_builtins(self) -> dict[str, str]:
        return {**asdict(self), "verdict": self.verdict.value}


def ok(check: str, detail: str) -> Finding:
    return Finding(check, Verdict.OK, detail)


def warn(check: str, detail: str, remedy: str) -> Finding:
    return Finding(check, Verdict.WARN, detail, remedy)


def fail(check: str, detail: str, remedy: str) -> Finding:
    return Finding(check, Verdict.FAIL, detail, remedy)
