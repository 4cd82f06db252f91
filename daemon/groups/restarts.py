"""How often, and how fast, a worker group is rebuilt."""

from __future__ import annotations

from typing import Final

_FIRST_DELAY_S: Final = 0.25
_MAX_DELAY_S: Final = 30.0
STEADY_S: Final = 600.0
"""A group that was ready for so long was sound, even if nobody asked it for anything."""


class RestartBudget:
    """Count lives that ended without a served job; at most ``limit`` rebuilds in a row, each waiting twice as long."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.failures = 0

    def note_served(self) -> None:
        """A job was served: the group works."""
        self.failures = 0

    def note_end(self, ready_for_s: float) -> float | None:
        """Note the end of a life. Returns the seconds to wait before the next, or ``None`` when there is none."""
        if ready_for_s >= STEADY_S:
            self.failures = 0
        self.failures += 1
        if self.failures > self.limit:
            return None
        return min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** (self.failures - 1))
