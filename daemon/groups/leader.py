"""The processes of a worker group: start the leader, watch it, and end it with its ranks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from xditd.daemon.configuration import Configuration
from xditd.daemon.groups.worker_output import WorkerOutput
from xditd.daemon.operations.event_loop import Callback, Deadline, EventLoop
from xditd.daemon.operations.log_buffer import LogBuffer
from xditd.ipc.settings.daemon import WORKER_OPTIONS
from xditd.ipc.worker_messages import STANDBY_BEGINS, STANDBY_IMPORTED

logger = logging.getLogger(__name__)

TERM_GRACE_S: Final = 2.0
"""From SIGTERM to SIGKILL. A group that is ended is broken or idle, so it has nothing to finish."""

_ANSWER_BYTES: Final = 64
_EMPTY_POLL_S: Final = 0.01
_EMPTY_DEADLINE_S: Final = 10.0


def leader_command(configuration: Configuration, token: str) -> list[str]:
    """Build the command line of the group's leader."""
    return [
        *configuration.worker_command,
        *("--runtime-dir", str(configuration.runtime.path)),
        *("--group-token", token),
        *(word for each in WORKER_OPTIONS for word in (each.flag, str(getattr(configuration, each.name)))),
    ]


class Leader:
    """Start the leader in a session of its own, and watch it until its process group is empty.

    ``on_gone(exit_status, output)`` is called once, with a negative status for a signal. A leader that ``waits`` has a
    socket as its stdin, from which it reads its flags: see :meth:`begin`.
    """

    def __init__(
        self,
        loop: EventLoop,
        log_buffer: LogBuffer,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_gone: Callable[[int, WorkerOutput], None],
        *,
        waits: bool = False,
    ) -> None:
        self._loop = loop
        self.on_gone = on_gone
        self.has_imported = False
        """Whether a leader that waits has said that all imports are done."""
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as given:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, reader)
            given.callback(os.close, writer)
            self._stdin: socket.socket | None = None
            stdin = subprocess.DEVNULL
            if waits:
                self._stdin, other_end = socket.socketpair()
                undo.callback(self._stdin.close)
                given.callback(other_end.close)
                stdin = other_end.fileno()
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=stdin,
                stdout=writer,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.pid = self._process.pid
            self._pidfd = self._open_pidfd()
            undo.pop_all()
        self._output = WorkerOutput(loop, log_buffer, reader)
        self._kill_deadline: Deadline | None = None
        self._empty_deadline: Deadline | None = None
        self._answer_deadline: Deadline | None = None
        self._is_gone = False
        loop.watch(self._pidfd, self._leader_exited)
        if self._stdin is not None:
            self._stdin.setblocking(False)
            loop.watch(self._stdin.fileno(), self._on_answer)

    @property
    def last_output(self) -> str:
        """The last error that a process of the group did not handle, else the last line."""
        return self._output.last_error or self._output.last_line

    def begin(self, arguments: Sequence[str], answer_s: float, on_silent: Callback) -> None:
        """Give a leader that waits its flags; ``on_silent`` is called if it does not begin within ``answer_s``.

        If it has ended, ``on_gone`` alone says so.
        """
        self._answer_deadline = self._loop.deadline(answer_s, on_silent)
        if self._stdin is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._stdin.sendall(json.dumps(list(arguments)).encode() + b"\n")

    def _on_answer(self) -> None:
        assert self._stdin is not None
        try:
            said = self._stdin.recv(_ANSWER_BYTES)
        except OSError:
            said = b""
        self.has_imported = self.has_imported or STANDBY_IMPORTED in said
        if not said or STANDBY_BEGINS in said:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._answer_deadline is not None:
            self._answer_deadline.stop()
        if self._stdin is not None:
            self._loop.unwatch(self._stdin.fileno())
            self._stdin.close()
            self._stdin = None

    def terminate(self) -> None:
        """Ask the leader to end the group, and kill whatever is left after :data:`TERM_GRACE_S`."""
        if self._kill_deadline is None and self._process.returncode is None:
            self._kill_deadline = self._loop.deadline(TERM_GRACE_S, self.kill)
            # By pidfd: the pid may belong to another process by now.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process of the group. Safe until the leader is reaped: its pid cannot be reused before."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _open_pidfd(self) -> int:
        try:
            return os.pidfd_open(self.pid)
        except OSError:  # no descriptor is left, and nothing would watch the process that runs by now
            self.kill()
            self._process.wait()
            raise

    def _leader_exited(self) -> None:
        """The leader is a zombie. Kill its ranks before its pid can be reused, then wait for them."""
        self._loop.unwatch(self._pidfd)
        self._close_stdin()
        if self._kill_deadline is not None:
            self._kill_deadline.stop()
        self.kill()
        self._process.wait()
        self._empty_deadline = self._loop.deadline(_EMPTY_DEADLINE_S, self._stop_waiting)
        self._wait_until_empty()

    def _wait_until_empty(self) -> None:
        if self._is_gone:
            return
        if self._is_empty():
            self._finish()
        else:
            # A killed rank ends only after the driver has freed its memory.
            self._loop.call_later(_EMPTY_POLL_S, self._wait_until_empty)

    def _stop_waiting(self) -> None:
        logger.error("ranks of leader pid=%d have not ended %.0f s after SIGKILL", self.pid, _EMPTY_DEADLINE_S)
        self._finish()

    def _finish(self) -> None:
        self._is_gone = True
        if self._empty_deadline is not None:
            self._empty_deadline.stop()
        self._close_stdin()
        self._output.close()
        os.close(self._pidfd)
        self.on_gone(self._process.returncode, self._output)

    def _is_empty(self) -> bool:
        """Reap adopted ranks; true once the process group has no members."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return True
        return False
