"""Notice a worker group that has fallen silent while it should be working."""

from __future__ import annotations

import time
from collections.abc import Callable

from xditd.daemon.loop import Loop, Timer
from xditd.daemon.paces import Paces
from xditd.ipc.worker_messages import AnyCommand, StepReached


class ProgressWatch:
    """Call ``on_silent(seconds)`` once a sign is overdue while ``is_busy()``.

    One timer follows all commands: there may be hundreds a second, and each would leave its own behind for minutes.
    """

    def __init__(self, loop: Loop, is_busy: Callable[[], bool], on_silent: Callable[[float], None]) -> None:
        self._loop = loop
        self._is_busy = is_busy
        self._on_silent = on_silent
        self._last_s = 0.0
        self._due_s = 0.0
        self._timer: Timer | None = None

    @property
    def overdue_s(self) -> float:
        """How long a busy group has been silent beyond the deadline; 0 while it is within."""
        if self._timer is None or not self._is_busy():
            return 0.0
        return max(0.0, time.monotonic() - self._due_s)

    def expect(self, deadline_s: float) -> None:
        """Something happened; the next sign is due within ``deadline_s``."""
        self._last_s = time.monotonic()
        self._due_s = self._last_s + deadline_s
        if self._timer is not None and self._timer.due_s > self._due_s:
            self.stop()
        if self._timer is None:
            self._timer = self._loop.call_later(deadline_s, self._check)

    def stop(self) -> None:
        """The group has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if not self._is_busy():
            return
        now = time.monotonic()
        if now >= self._due_s:
            self._on_silent(now - self._last_s)
        else:
            self._timer = self._loop.call_later(self._due_s - now, self._check)


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

    def answered(self) -> None:
        self._paces.end()

    def group_ended(self) -> None:
        self._watch.stop()
        self._paces.forget()
