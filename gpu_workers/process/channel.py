"""A rank's end of the socket to the daemon."""

from __future__ import annotations

from collections import deque

import zmq

from xditd.ipc import limits
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.codec import command_decoder, encode
from xditd.ipc.worker_messages import AnyCommand, AnyReport, CancelRun


class DaemonChannel:
    """Commands in, reports out. Used by the rank's one thread only."""

    def __init__(self, runtime_dir: RuntimeDir) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1_000)  # a last report may still leave; a dead daemon must not hold us
        self._socket.setsockopt(zmq.MAXMSGSIZE, limits.MAX_MESSAGE_BYTES)
        self._socket.connect(endpoint(runtime_dir.worker_socket))
        self._waiting: deque[AnyCommand] = deque()

    def receive(self, wait_s: float | None = None) -> AnyCommand | None:
        """Wait for the next command, ``None`` after ``wait_s`` without one.

        Without ``wait_s`` there is no deadline: the kernel ends this process with the daemon.
        """
        if self._waiting:
            return self._waiting.popleft()
        if wait_s is not None and not self._socket.poll(round(wait_s * 1e3)):
            return None
        return command_decoder.decode(self._socket.recv())

    def is_cancelled(self, op_number: int, wait_s: float = 0.0) -> bool:
        """Whether the running command was cancelled by now, or is within ``wait_s``, which ends with any command.

        Other commands stay for :meth:`receive`.
        """
        if wait_s:
            self._socket.poll(round(wait_s * 1e3))
        while self._socket.poll(0):
            self._waiting.append(command_decoder.decode(self._socket.recv()))
        return any(isinstance(c, CancelRun) and c.target_op_number == op_number for c in self._waiting)

    def send(self, report: AnyReport) -> None:
        self._socket.send(encode(report))

    def close(self) -> None:
        self._socket.close()
        self._context.term()
