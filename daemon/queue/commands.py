"""Scripts: generators that send commands to the worker group and receive all ranks' answers."""

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
"""A reply carries at most 64 timings, some of which the daemon adds."""

Script = Generator[CommandMaker, Answers, T]
"""Yields a command, receives every rank's answer, returns the result. If a rank refuses a command, its error is raised
at the ``yield``; if the group ends, the script is closed, so ``finally`` runs but may not yield."""


@dataclass
class Task(Generic[T]):
    """A script and its callbacks, exactly one of which is called at its end."""

    script: Script[T]
    on_done: Callable[[T], None]
    on_failed: Callable[[XditdError], None]
    frees_memory: bool = False
    """Whether a client frees memory once it fails; if the group ends, it fails after the group's processes ended."""


def expect(answers: Answers, kind: type[A]) -> list[A]:
    """Check that every rank answered with a message of this kind; raises ``Internal``."""
    found = [answer for answer in answers if isinstance(answer, kind)]
    if len(found) != len(answers):
        names = listed(type(answer).__name__ for answer in answers)
        raise Internal(f"the ranks answered {names} where {kind.__name__} was asked for")
    return found


def slowest_ms(timings: Sequence[dict[str, float]]) -> dict[str, float]:
    """Merge the ranks' timings: the slowest rank's in each phase."""
    merged: dict[str, float] = {}
    for rank in timings:
        for phase, took_ms in rank.items():
            merged[phase] = max(took_ms, merged.get(phase, 0.0))
    return dict(sorted(merged.items())[:MAX_PHASES])
