"""What happened, and which of it must not have happened."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

JOB_DEADLINE_S = 240.0
"""A request that takes longer has hung: the workers' own deadline, a pause, a rebuild on a busy machine and the queue
fit in several times."""
SILENCE_S = JOB_DEADLINE_S + 15.0
"""A client that reports nothing for so long hangs itself: each of its requests has the deadline above."""

AMBIENT = frozenset({"workers_lost", "lease_lost", "unknown_component", "session_lost"})
"""Codes that any request may end with while the group is rebuilt and other clients come and go."""
DAEMON_GONE = frozenset({"daemon_unreachable", "daemon_stopping"})
"""Codes that are right only while a fault takes the daemon or its socket away."""
LOST = AMBIENT | DAEMON_GONE | {"deadline_exceeded"}
"""Codes of a request that was lost without its own fault."""
EXPECTED = {
    "cancel": frozenset({"cancelled"}),
    "return": frozenset({"lease_lost"}),
    "rewrite-file": frozenset({"stale_source"}),
    "touch-inode": frozenset({"stale_source"}),
    "nan-weight": frozenset({"not_finite"}),
}
"""What the deed of a client itself may end with."""


@dataclass(frozen=True)
class TypedError:
    """One request that ended with an error."""

    at: float
    deed: str
    code: str
    detail: str


@dataclass
class Record:
    """Everything that is counted. Safe to use from several threads."""

    right: int = 0
    wrong: int = 0
    hangs: int = 0
    lends: int = 0
    slowest_s: float = 0.0
    errors: list[TypedError] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    """What was not as promised, and how often."""
    notes: list[str] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds and bytes of the daemon's memory, since that daemon started."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, float] = {}
        self._gone_until = 0.0
        self._first_details: dict[str, str] = {}

    # --- Clients

    def hear(self, client: int, event: dict[str, Any]) -> None:
        """Take in one line of a client: something began, or ended in one of these ways.

        ``right``, ``wrong``: a result, compared. ``lend``, ``session``: done. ``did``: a fault that the client itself
        is. ``error``: a typed error. ``broken``: a promise that does not hold, in words.
        """
        with self._lock:
            self._waiting[client] = time.monotonic()
            self.slowest_s = max(self.slowest_s, event.get("took_s", 0.0))
            kind = event.get("ends")
            if kind == "right":
                self.right += 1
            elif kind == "wrong":
                self.wrong += 1
                self.notes.append(f"client {client}: {event['detail']}")
            elif kind == "lend":
                self.lends += 1
            elif kind == "did":
                self.faults[event["deed"]] += 1
            elif kind == "broken":
                self._break_promise(event["deed"], f"client {client}: {event['detail']}")
            elif kind == "error":
                self._hear_error(client, event["deed"], event["code"], event["detail"])

    def _hear_error(self, client: int, deed: str, code: str, detail: str) -> None:
        self.errors.append(TypedError(time.monotonic(), deed, code, detail))
        if code == "deadline_exceeded":
            self.hangs += 1
            self.notes.append(f"client {client}: {deed}: {detail}")
        elif code in DAEMON_GONE:
            if time.monotonic() > self._gone_until:
                self._break_promise(f"{deed}: {code}, though the daemon should be there", f"client {client}: {detail}")
        elif code not in AMBIENT | EXPECTED.get(deed, frozenset()):
            self._break_promise(f"{deed}: unexpected {code}", f"client {client}: {detail}")

    def hear_silence(self, now: float) -> list[int]:
        """Count each client that has said nothing for too long as hung; returns their numbers."""
        with self._lock:
            silent = [number for number, since in self._waiting.items() if now - since > SILENCE_S]
            for number in silent:
                self.hangs += 1
                self.notes.append(f"client {number} said nothing for {now - self._waiting[number]:.0f} s")
                self._waiting[number] = now
            return silent

    def start_client(self, number: int) -> None:
        with self._lock:
            self._waiting[number] = time.monotonic()

    # --- Faults

    def expect_daemon_gone(self, for_s: float) -> None:
        """Let clients find no daemon for so long from now."""
        with self._lock:
            self._gone_until = max(self._gone_until, time.monotonic() + for_s)

    def errors_since(self, at: float) -> list[TypedError]:
        with self._lock:
            return [error for error in self.errors if error.at >= at]

    def count_fault(self, name: str) -> None:
        with self._lock:
            self.faults[name] += 1

    def break_promise(self, what: str, detail: str) -> None:
        """Count a promise that does not hold; of ``detail`` the first is kept."""
        with self._lock:
            self._break_promise(what, detail)

    def _break_promise(self, what: str, detail: str) -> None:
        self.broken[what] += 1
        self._first_details.setdefault(what, detail)

    def find_failures(self) -> list[str]:
        """Name everything that must not have happened."""
        failures = []
        if self.wrong:
            failures.append(f"{self.wrong} wrong results")
        if self.hangs:
            failures.append(f"{self.hangs} requests hung")
        for what, count in self.broken.items():
            failures.append(f"{count} x {what}; first: {self._first_details[what]}")
        return failures


def is_lost(error: TypedError) -> bool:
    """Whether a request ended by no deed of its own client's."""
    return error.code in LOST - EXPECTED.get(error.deed, frozenset())
