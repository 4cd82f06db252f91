"""From the making of a client to its end: one session after the other, each with one daemon."""

from __future__ import annotations

import os
import threading
import warnings

from xditd.client.io_blocks import IoPool
from xditd.client.session import Closure, Session
from xditd.ipc.addresses import RuntimeDir


class Lifetime:
    """Opens sessions and ends them. It does not know its client, so that a client that nobody holds is collected."""

    def __init__(self, runtime: RuntimeDir, name: str, pool: IoPool, silence_s: float) -> None:
        self.runtime = runtime
        self._name = name
        self._pool = pool
        self._silence_s = silence_s
        self._made_by_pid = os.getpid()
        self._lock = threading.Lock()
        self._closure = Closure()
        self._session: Session | None = None

    @property
    def state(self) -> str:
        """``closed``, or which daemon is at the other end."""
        session = self._session
        if self._closure.reason is not None:
            return "closed"
        return "no daemon" if session is None or session.is_lost else f"daemon {session.daemon_pid}"

    def current(self) -> Session:
        """The session, or a new one where the daemon of the last one is gone.

        Raises:
            Closed: the client is closed.
            DaemonUnreachable: no daemon runs.
        """
        with self._lock:
            self._closure.check()
            if self._session is not None and self._session.is_lost:
                self._session.close()
                self._session = None
            if self._session is None:
                self._session = self._open()
            return self._session

    def close(self) -> None:
        """End the session and its loans, and wait for that. A second call does nothing."""
        with self._lock:
            session, self._session = self._session, None
            self._closure.reason = self._closure.reason or "this client is closed"
        if session is not None:
            session.close()
        self._pool.close()

    def abandon(self) -> None:
        """End the session and its loans, since nobody holds the client any more. Waits for nothing, and takes no lock.

        Python calls this at any point of any thread, also one that holds a lock of ours.
        """
        if os.getpid() != self._made_by_pid:
            return  # a fork has a copy of the client, and none of its loans
        session, self._session = self._session, None
        self._closure.reason = "this client was not closed, and nobody held it any more"
        if session is not None:
            session.abandon()
        warnings.warn(
            f"a Client of {self.runtime.path} was not closed: its loans go back; use a with block, or call close()",
            ResourceWarning,
            stacklevel=1,
        )

    def _open(self) -> Session:
        return Session(self.runtime, self._name, self._pool, self._silence_s, self._closure)
