"""Notice a worker group that has fallen silent while it should be working."""

from __future__ import annotations

from collections.abc import Callable

from xditd.daemon.loop import Deadline, Loop
from xditd.daemon.paces import Paces
from xditd.ipc.worker_messages import AnyCommand, StepReached


class ProgressWatch:
    """Call ``on_silent(seconds)`` once a sign is overdue while ``is_busy()``."""

    def __init__(self, loop: Loop, is_busy: Callable[[], bool], on_silent: Callable[[float], None]) -> None:
        self._is_busy = is_busy
        self._on_silent = on_silent
        self._deadline = Deadline(loop, self._missed)

    @property
    def overdue_s(self) -> float:
        """How long a busy group has been silent beyond the deadline; 0 while it is within."""
        return self._deadline.overdue_s if self._is_busy() else 0.0

    def expect(self, deadline_s: float) -> None:
        """Something happened; the next sign is due within ``deadline_s``."""
        self._deadline.extend(deadline_s)

    def stop(self) -> None:
        """The group has ended."""
        self._deadline.stop()

    def _missed(self) -> None:
        if self._is_busy():
            self._on_silent(self._deadline.waited_s)


class CommandWatch:
    """Watch over one command after the other: each sign of progress earns the time that the next one usually takes."""

    def __init__(self, paces: Paces, watch: ProgressWatch) -> None:
        self._paces = paces
        self._watch = watch
        self._is_last_chance = False

    @property
    def overdue_s(self) -> float:
        return self._watch.overdue_s

    def begin(self, command: AnyCommand) -> None:
        self._is_last_chance = False
        self._watch.expect(self._paces.begin(command))

    def step_reached(self, step: StepReached) -> None:
        deadline_s = self._paces.step(step.step, step.total_steps)
        if not self._is_last_chance:
            self._watch.expect(deadline_s)

    def told_to_stop(self) -> None:
        """A job is to end: going on earns it no more time."""
        self._is_last_chance = True

    def answered(self, *, is_done: bool) -> None:
        """Every rank has answered; ``is_done`` unless one of them refused or failed."""
        if is_done:
            self._paces.end()
        else:
            self._paces.discard()

    def group_ended(self) -> None:
        self._watch.stop()
        self._paces.forget()
