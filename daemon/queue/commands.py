"""Scripts of commands for a worker group, and what all ranks' answers to a command amount to."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from xditd.daemon.groups.ranks import Answers, CommandMaker
from xditd.ipc.errors import Internal, XditdError
from xditd.ipc.name_lists import listed
from xditd.ipc.worker_messages import Answer

T = TypeVar("T")
A = TypeVar("A", bound=Answer)

MAX_PHASES: Final = 60
"""A message carries 64 timings; some are our own."""

Script = Generator[CommandMaker, Answers, T]
"""Yields a command, receives every rank's answer, returns the result. Where a rank refuses a command, its error is
raised at the ``yield``; where the group is lost, the script is closed, so ``finally`` runs but may not yield."""


@dataclass
class Task(Generic[T]):
    """A script, and whom to tell how it ended: exactly one of the two is called."""

    script: Script[T]
    on_done: Callable[[T], None]
    on_failed: Callable[[XditdError], None]


def expect(answers: Answers, kind: type[A]) -> list[A]:
    """Check that every rank gave the answer that the command asks for.

    Raises:
        Internal: a rank answered with another message.
    """
    found = [answer for answer in answers if isinstance(answer, kind)]
    if len(found) != len(answers):
        names = listed(type(answer).__name__ for answer in answers)
        raise Internal(f"the ranks answered {names} where {kind.__name__} was asked for")
    return found


def slowest_ms(timings: Sequence[dict[str, float]]) -> dict[str, float]:
    """Merge the ranks' timings: by phase, the one that all had to wait for."""
    merged: dict[str, float] = {}
    for rank in timings:
        for phase, took_ms in rank.items():
            merged[phase] = max(took_ms, merged.get(phase, 0.0))
    return dict(sorted(merged.items())[:MAX_PHASES])
