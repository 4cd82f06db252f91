"""Client sessions: one for each connection that said hello, tied to the process behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.sockets.credentials import Credentials
from xditd.ipc.errors import Busy, ProcessGone
from xditd.ipc.processes import ProcessIdentity, identify


@dataclass(eq=False)
class Session:
    """``address`` is the peer's address as the socket gives it; every message of the session carries the same."""

    routing_id: bytes
    address: str
    process: ProcessIdentity
    pidfd: int
    client_name: str
    heard_s: float = 0.0
    """When its client last said something, by the loop's clock."""
    has_io: bool = False
    """Whether workers may keep something for its process; passed on if others of the process are open when it ends."""


class Sessions:
    """Open and close sessions. ``on_exit`` hears of a session whose process has exited."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._by_route: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._by_route)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_route.values()))

    def find(self, routing_id: bytes) -> Session | None:
        return self._by_route.get(routing_id)

    def open(self, routing_id: bytes, address: str, peer: Credentials, client_name: str) -> Session:
        """Open a session and take hold of its process.

        Raises:
            Busy: the daemon may open no more descriptors.
            ProcessGone: the process has exited already.
        """
        try:
            pidfd = os.pidfd_open(peer.pid)
        except ProcessLookupError:
            raise ProcessGone(f"process {peer.pid} has exited") from None
        except OSError as error:
            raise Busy(f"no more clients can be watched: {error.strerror}; raise the limit on open files") from error
        try:
            session = Session(routing_id, address, identify(peer.pid), pidfd, client_name, self._loop.clock.now_s())
        except ProcessGone:
            os.close(pidfd)
            raise
        self._by_route[routing_id] = session
        return session

    def close(self, session: Session) -> bool:
        """Forget a session; false when that was done before."""
        if self._by_route.pop(session.routing_id, None) is None:
            return False
        self._loop.unwatch(session.pidfd)
        os.close(session.pidfd)
        return True

    def of_process(self, process: ProcessIdentity) -> Session | None:
        """Find any session of a process."""
        return next((session for session in self._by_route.values() if session.process == process), None)
