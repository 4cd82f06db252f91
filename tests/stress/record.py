"""Count the events of a stress run, and decide which of them are failures."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

JOB_DEADLINE_S = 240.0
"""A request that takes longer hangs: this is several times the workers' deadline, a pause, a rebuild and the queue."""
SILENCE_S = JOB_DEADLINE_S + 15.0
"""A client that reports nothing for so long hangs, because each of its requests has the deadline above."""

AMBIENT = frozenset({"workers_lost", "lease_lost", "unknown_component", "session_lost"})
"""Codes with which any request may end while faults rebuild the group and end other clients."""
DAEMON_GONE = frozenset({"daemon_unreachable", "daemon_stopping"})
"""Codes that are allowed only while a fault removes the daemon or its socket."""
LOST = AMBIENT | DAEMON_GONE | {"deadline_exceeded"}
"""Codes of a request that was lost through something else than itself."""
EXPECTED = {
    "cancel": frozenset({"cancelled"}),
    "return": frozenset({"lease_lost"}),
    "rewrite-file": frozenset({"stale_source"}),
    "touch-inode": frozenset({"stale_source"}),
    "nan-weight": frozenset({"not_finite"}),
}
"""Codes with which a client's own action may end."""


@dataclass(frozen=True)
class TypedError:
    """One request that ended with an error."""

    at: float
    action: str
    code: str
    detail: str


@dataclass
class Record:
    """All counts of a run. Thread-safe."""

    right: int = 0
    wrong: int = 0
    hangs: int = 0
    lends: int = 0
    slowest_s: float = 0.0
    errors: list[TypedError] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    """Broken guarantees, and how often each was broken."""
    notes: list[str] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the daemon's start, and bytes of its memory then."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, float] = {}
        self._gone_until = 0.0
        self._first_details: dict[str, str] = {}

    # --- Clients

    def add_event(self, client: int, event: dict[str, Any]) -> None:
        """Add one event of a client: something began, or ended in one of these ways.

        ``right``, ``wrong``: a compared result. ``lend``, ``session``: done. ``did``: the client injected a fault.
        ``error``: a typed error. ``broken``: a broken guarantee, in words.
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
                self.faults[event["action"]] += 1
            elif kind == "broken":
                self._add_broken(event["action"], f"client {client}: {event['detail']}")
            elif kind == "error":
                self._add_error(client, event["action"], event["code"], event["detail"])

    def _add_error(self, client: int, action: str, code: str, detail: str) -> None:
        self.errors.append(TypedError(time.monotonic(), action, code, detail))
        if code == "deadline_exceeded":
            self.hangs += 1
            self.notes.append(f"client {client}: {action}: {detail}")
        elif code in DAEMON_GONE:
            if time.monotonic() > self._gone_until:
                self._add_broken(f"{action}: {code}, though the daemon should be there", f"client {client}: {detail}")
        elif code not in AMBIENT | EXPECTED.get(action, frozenset()):
            self._add_broken(f"{action}: unexpected {code}", f"client {client}: {detail}")

    def find_silent_clients(self, now: float) -> list[int]:
        """Count each client that has reported nothing for too long as hung; returns their numbers."""
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
        """Allow clients to find no daemon for the next ``for_s`` seconds."""
        with self._lock:
            self._gone_until = max(self._gone_until, time.monotonic() + for_s)

    def errors_since(self, at: float) -> list[TypedError]:
        with self._lock:
            return [error for error in self.errors if error.at >= at]

    def count_fault(self, name: str) -> None:
        with self._lock:
            self.faults[name] += 1

    def add_broken(self, what: str, detail: str) -> None:
        """Count a broken guarantee; only its first ``detail`` is kept."""
        with self._lock:
            self._add_broken(what, detail)

    def _add_broken(self, what: str, detail: str) -> None:
        self.broken[what] += 1
        self._first_details.setdefault(what, detail)

    def find_failures(self) -> list[str]:
        """Name all failures of the run."""
        failures = []
        if self.wrong:
            failures.append(f"{self.wrong} wrong results")
        if self.hangs:
            failures.append(f"{self.hangs} requests hung")
        for what, count in self.broken.items():
            failures.append(f"{count} x {what}; first: {self._first_details[what]}")
        return failures


def is_lost(error: TypedError) -> bool:
    """Return whether a request was lost through something else than its own client's action."""
    return error.code in LOST - EXPECTED.get(error.action, frozenset())
