"""Client sessions: one for each connection that sent ``Hello``, tied to the client's process by a pidfd."""

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
    """A client's session. ``address`` is libzmq's peer address, the same for every message of the session."""

    routing_id: bytes
    address: str
    process: ProcessIdentity
    pidfd: int
    client_name: str
    heard_s: float = 0.0
    """When its client last sent a message, by the loop's clock."""
    has_io: bool = False
    """Whether workers may have I/O blocks of its process mapped; passed on to another session of the process."""
    has_device_io: bool = False
    """Whether device memory is among them."""


class Sessions:
    """Open, find and close sessions."""

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
        """Open a session, with a pidfd of its process.

        Raises:
            Busy: the daemon has no free descriptor.
            ProcessGone: the process has exited already.
        """
        try:
            pidfd = os.pidfd_open(peer.pid)
        except ProcessLookupError:
            raise ProcessGone(f"process {peer.pid} has exited") from None
        except OSError as error:
            raise Busy(f"no descriptor for one more client: {error.strerror}; raise the limit on open files") from error
        try:
            session = Session(routing_id, address, identify(peer.pid), pidfd, client_name, self._loop.clock.now_s())
        except ProcessGone:
            os.close(pidfd)
            raise
        self._by_route[routing_id] = session
        return session

    def close(self, session: Session) -> bool:
        """Close a session; false if it was closed before."""
        if self._by_route.pop(session.routing_id, None) is None:
            return False
        self._loop.unwatch(session.pidfd)
        os.close(session.pidfd)
        return True

    def of_process(self, process: ProcessIdentity) -> Session | None:
        """Find any session of a process."""
        return next((session for session in self._by_route.values() if session.process == process), None)
