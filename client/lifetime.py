"""The sessions of a client: opened on demand, one for each daemon process, and closed with the client."""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING

from xditd.client.forks import maker_of_client
from xditd.client.session import ClosedState, Session
from xditd.ipc.addresses import RuntimeDir

if TYPE_CHECKING:
    from xditd.client.io_blocks import IoPool


class Lifetime:
    """Opens and closes a client's sessions. It holds no reference to the client, which can so be garbage-collected."""

    def __init__(self, runtime: RuntimeDir, name: str, pool: IoPool, silence_s: float) -> None:
        self.runtime = runtime
        self._name = name
        self._pool = pool
        self._silence_s = silence_s
        self._maker = maker_of_client()
        self._lock = threading.Lock()
        self._closed = ClosedState()
        self._session: Session | None = None

    @property
    def state(self) -> str:
        """``closed``, ``no daemon`` or ``daemon PID``."""
        session = self._session
        if self._closed.reason is not None:
            return "closed"
        return "no daemon" if session is None or session.is_lost else f"daemon {session.daemon_pid}"

    def current(self) -> Session:
        """Return the session, or open a new one if the last one's daemon has exited.

        Raises:
            Closed: the client is closed.
            DaemonUnreachable: no daemon runs.
            Unsupported: this is a fork of the process that made the client.
        """
        self._maker.check()
        with self._lock:
            self._closed.check()
            if self._session is not None and self._session.is_lost:
                self._session.close()
                self._session = None
            if self._session is None:
                self._session = self._open()
            return self._session

    def close(self) -> None:
        """End the session and its loans, and wait for that. May be called twice; does nothing in a fork."""
        if not self._maker.is_here:
            return
        with self._lock:
            session, self._session = self._session, None
            self._closed.reason = self._closed.reason or "this client is closed"
        try:
            if session is not None:
                session.close()
        finally:
            self._pool.close()

    def abandon(self) -> None:
        """End the session and its loans when the client is garbage-collected. Does not block, and takes no lock:
        Python calls this at any point of any thread, also while the thread holds one of the locks here.
        """
        if not self._maker.is_here:
            return  # a fork has a copy of the client, but not its loans
        session, self._session = self._session, None
        self._closed.reason = "this client was not closed before it was garbage-collected"
        if session is not None:
            session.abandon()
        warnings.warn(
            f"a Client of {self.runtime.path} was not closed: its loans end now; use a with block, or call close()",
            ResourceWarning,
            stacklevel=1,
        )

    def _open(self) -> Session:
        return Session(self.runtime, self._name, self._pool, self._silence_s, self._closed)
