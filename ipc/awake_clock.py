"""A clock that does not count the time in which its process stood still (stopped, frozen or starved)."""

from __future__ import annotations

import math
import threading
import time
from typing import Final

TICK_S: Final = 0.5
"""A process that waits for another one reads its clock at least so often."""

STANDSTILL_S: Final = 1.0
"""If two readings during a wait are further apart than this, the process did not run in between."""


class AwakeClock:
    """A monotonic clock of the time that this process ran; read it at least every :data:`TICK_S` during a wait.

    A stopped process (SIGSTOP, a frozen container, a paused virtual machine) does not know what others did meanwhile;
    they may have been stopped too. By the monotonic clock all their deadlines would be missed at once. (When the whole
    machine is suspended, Linux stops the monotonic clock: clock_gettime(2).) So a gap of more than
    :data:`STANDSTILL_S` between two readings is not counted, and :meth:`waited_s` starts again at its end.

    A gap because nobody waited is harmless: a wait begins with a reading. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_s = time.monotonic()
        self._noted_s = -math.inf
        self._resumed_s = -math.inf
        self.stood_still_s = 0.0
        """The sum of all gaps that were not counted."""

    def now_s(self) -> float:
        """Read the clock."""
        read_s = time.monotonic()
        gap_s = read_s - self._read_s
        if gap_s > STANDSTILL_S:
            self._skip_gap(gap_s, read_s)
        # Only now: a thread that no longer sees the gap here must find it excluded.
        self._read_s = read_s
        return read_s - self.stood_still_s

    def count_gap(self) -> None:
        """Count the time since the last reading, however long. Call it after a blocking call.

        A blocking call may take longer than :data:`STANDSTILL_S`; a loop of such calls would never time out otherwise.
        """
        self._read_s = time.monotonic()

    def waited_s(self, since_s: float) -> float:
        """Seconds since ``since_s`` of this clock, or since the end of the last gap if that is later."""
        now_s = self.now_s()
        return now_s - max(since_s, self._resumed_s)

    def _skip_gap(self, gap_s: float, read_s: float) -> None:
        """Exclude a gap. Only this takes the lock: every message reads the clock."""
        with self._lock:
            if read_s - self._noted_s <= STANDSTILL_S:
                return  # another thread has seen the same gap
            self._noted_s = read_s
            self.stood_still_s += gap_s
            self._resumed_s = read_s - self.stood_still_s
