"""The methods of ``Client`` that ask for the daemon's state, wait for it, or stop it."""

from __future__ import annotations

from collections.abc import Callable

from xditd.client.connection import CONTROL_DEADLINE_S
from xditd.client.session import Session
from xditd.client.waiting import wait_for
from xditd.ipc.errors import BadRequest
from xditd.ipc.replies import LogLines, Status, Stopping
from xditd.ipc.requests import GetLogs, GetStatus, Stop
from xditd.ipc.status import DaemonStatus


class DaemonMethods:
    """A base of ``Client``, which sets ``_current``: a function that returns its session."""

    _current: Callable[[], Session]

    @property
    def daemon_pid(self) -> int:
        """The process id of the daemon."""
        return self._current().daemon_pid

    def status(self, *, deadline_s: float = CONTROL_DEADLINE_S) -> DaemonStatus:
        """Ask for the daemon's state."""
        connection = self._current().connection
        request = GetStatus(request_id=connection.next_request_id())
        return connection.ask(request, Status, deadline_s=deadline_s).daemon

    def wait_ready(
        self, wait_s: float, *, workers: bool = True, show: Callable[[str], None] = lambda _: None
    ) -> DaemonStatus:
        """Wait until a daemon answers and, with ``workers``, until its workers are ready.

        ``show`` is called with the reason for waiting, whenever it changes. Jobs that are sent earlier are queued.

        Raises:
            DaemonUnreachable: no daemon answers within ``wait_s``.
            WorkersUnavailable: the workers are given up.
            DeadlineExceeded: the workers are not ready within ``wait_s``.
        """
        return wait_for(self.status, wait_s, workers=workers, show=show)

    def logs(self, after: int = 0, *, deadline_s: float = CONTROL_DEADLINE_S) -> tuple[list[str], int]:
        """Return recent log lines from number ``after`` on, and the value of ``after`` for the next request."""
        if isinstance(after, bool) or not isinstance(after, int) or not 0 <= after < 2**63:
            raise BadRequest(f"after: {after!r:.100} is not the number of a line, from 0 on, below 2**63")
        connection = self._current().connection
        request = GetLogs(request_id=connection.next_request_id(), after_line=after)
        reply = connection.ask(request, LogLines, deadline_s=deadline_s)
        return list(reply.lines), reply.next_line

    def stop(self, *, deadline_s: float = CONTROL_DEADLINE_S) -> bool:
        """Stop the daemon and wait; returns whether it exited within ``deadline_s``."""
        connection = self._current().connection
        connection.ask(Stop(request_id=connection.next_request_id()), Stopping, deadline_s=deadline_s)
        return connection.wait_lost(deadline_s)
