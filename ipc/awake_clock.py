"""A clock that does not count the time in which its own process stood still."""

from __future__ import annotations

import math
import threading
import time
from typing import Final

TICK_S: Final = 0.5
"""Whoever waits for another process reads its clock at least so often."""

STANDSTILL_S: Final = 1.0
"""Two readings further apart than this, while somebody waits: this process did not run in between."""


class AwakeClock:
    """Seconds that this process has run; read it at least every :data:`TICK_S` while anything is waited for.

    A stopped process (SIGSTOP, a frozen container, a paused virtual machine) cannot see what others did meanwhile, and
    they may have stood still with it. The monotonic clock goes on all the same: judged by it, everybody is late at
    once. (In a suspend of the whole machine Linux stops the monotonic clock, too: clock_gettime(2).) Here a gap of more
    than :data:`STANDSTILL_S` between two readings is not counted, and whoever was waited for gets all the time again.

    A clock that nobody read because nobody waited has a gap as well; that is harmless, since waiting begins with a
    reading. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_s = time.monotonic()
        self._noted_s = -math.inf
        self._resumed_s = -math.inf
        self.stood_still_s = 0.0
        """The time that was not counted, altogether."""

    def now_s(self) -> float:
        """Read the clock."""
        read_s = time.monotonic()
        gap_s = read_s - self._read_s
        self._read_s = read_s
        if gap_s > STANDSTILL_S:
            self._note(gap_s, read_s)
        return read_s - self.stood_still_s

    def count_gap(self) -> None:
        """Count the time since the last reading, however long it is: this process was in a call that waits by itself.

        Such a call may take longer than :data:`STANDSTILL_S` each time, and who calls it again and again would wait
        for ever otherwise. Call this as it returns.
        """
        self._read_s = time.monotonic()

    def waited_s(self, since_s: float) -> float:
        """How long others had since ``since_s`` of this clock, and since this process last stood still."""
        now_s = self.now_s()
        return now_s - max(since_s, self._resumed_s)

    def _note(self, gap_s: float, read_s: float) -> None:
        """Leave a gap out. Only here is a lock: a reading is on the way of every message."""
        with self._lock:
            if read_s - self._noted_s <= STANDSTILL_S:
                return  # another thread has seen the same gap
            self._noted_s = read_s
            self.stood_still_s += gap_s
            self._resumed_s = read_s - self.stood_still_s
