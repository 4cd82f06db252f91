"""One errand at a time for the worker group: each is a script that yields commands and receives all ranks' answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from xditd.daemon.groups.ranks import CommandMaker, first_failure
from xditd.daemon.groups.worker_group import Supervisor
from xditd.ipc.errors import Internal, XditdError, error_for
from xditd.ipc.name_lists import listed
from xditd.ipc.worker_messages import Answer, Command, ForgetClient, Unmap

T = TypeVar("T")
A = TypeVar("A", bound=Answer)

MAX_PHASES: Final = 60
"""A message carries 64 timings; some are our own."""

Answers = Sequence[Answer]
Script = Generator[CommandMaker, Answers, T]
"""Yields a command, receives every rank's answer, returns the result. Where a rank refuses a command, its error is
raised at the ``yield``; where the group is lost, the script is closed, so ``finally`` runs but may not yield."""


@dataclass
class Errand(Generic[T]):
    """A script, and whom to tell how it ended: exactly one of the two is called."""

    script: Script[T]
    on_done: Callable[[T], None]
    on_failed: Callable[[XditdError], None]


class ErrandRunner:
    """Run errands in turn, whenever the group is ready for one. ``next_errand`` decides about the order."""

    def __init__(self, supervisor: Supervisor, next_errand: Callable[[], Errand[Any] | None]) -> None:
        self._supervisor = supervisor
        self._next_errand = next_errand
        self.current: Errand[Any] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether a new errand would start at once."""
        return self.current is None and self._supervisor.is_idle

    def advance(self) -> None:
        """Start what can be started. The loop calls this after each round, and nobody else does."""
        while self.is_idle:
            errand = self._next_errand()
            if errand is None:
                return
            self.current = errand
            self._resume(errand, lambda script: next(script))

    def answered(self, command: Command, answers: Answers) -> None:
        """Hand all ranks' answers to the script that waits for them."""
        errand = self.current
        if errand is None:
            raise Internal(f"{type(command).__name__} was answered, but no errand waits")
        failure = first_failure(answers)
        if failure is None:
            self._resume(errand, lambda script: script.send(answers))
        elif isinstance(command, (Unmap, ForgetClient)):
            # The rank holds memory that its owner is about to free: only the end of its process returns it.
            self._supervisor.end(Internal(f"rank {failure.rank} could not unmap: {failure.detail}"))
        else:
            error = error_for(failure.code, failure.detail, names=failure.names)
            self._resume(errand, lambda script: script.throw(error))

    def group_ended(self, error: XditdError) -> None:
        """Close the script that waits for answers which will never come."""
        errand, self.current = self.current, None
        if errand is not None:
            errand.script.close()
            errand.on_failed(error)

    def _resume(self, errand: Errand[Any], resume: Callable[[Script[Any]], CommandMaker]) -> None:
        try:
            make = resume(errand.script)
        except StopIteration as end:
            self.current = None
            errand.on_done(end.value)
        except XditdError as error:
            self.current = None
            errand.on_failed(error)
        else:
            self._supervisor.tell(make)


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
