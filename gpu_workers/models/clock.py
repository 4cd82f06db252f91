"""A clock that times the phases of a task."""

from __future__ import annotations

import time


class Clock:
    """Milliseconds by phase; each mark ends a phase and begins the next."""

    def __init__(self, marks_ms: dict[str, float] | None = None) -> None:
        self.marks_ms: dict[str, float] = {} if marks_ms is None else marks_ms
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.marks_ms[phase] = self.marks_ms.get(phase, 0.0) + (now - self._last) * 1e3
        self._last = now
