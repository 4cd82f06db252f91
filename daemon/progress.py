"""Notice a worker group that has fallen silent while it should be working."""

from __future__ import annotations

import time
from collections.abc import Callable

from xditd.daemon.loop import Loop, Timer


class ProgressWatch:
    """Call ``on_silent(seconds)`` when ``deadline_s`` pass without a report while ``is_busy()``.

    One timer follows all commands: there may be hundreds a second, and each would leave its own behind for minutes.
    """

    def __init__(
        self, loop: Loop, deadline_s: float, is_busy: Callable[[], bool], on_silent: Callable[[float], None]
    ) -> None:
        self._loop = loop
        self._deadline_s = deadline_s
        self._is_busy = is_busy
        self._on_silent = on_silent
        self._last_s = 0.0
        self._timer: Timer | None = None

    @property
    def overdue_s(self) -> float:
        """How long a busy group has been silent beyond the deadline; 0 while it is within."""
        if self._timer is None or not self._is_busy():
            return 0.0
        return max(0.0, time.monotonic() - self._last_s - self._deadline_s)

    def note_report(self) -> None:
        """A rank said something."""
        self._last_s = time.monotonic()

    def begin(self) -> None:
        """A command was sent."""
        self.note_report()
        if self._timer is None:
            self._timer = self._loop.call_later(self._deadline_s, self._check)

    def stop(self) -> None:
        """The group has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if not self._is_busy():
            return
        silent_s = time.monotonic() - self._last_s
        if silent_s >= self._deadline_s:
            self._on_silent(silent_s)
        else:
            self._timer = self._loop.call_later(self._deadline_s - silent_s, self._check)
