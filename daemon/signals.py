"""SIGTERM and SIGINT: the first asks the loop to stop in order, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

from xditd.daemon.service import Service


class StopSignals:
    """Handle the stop signals of this process for ``service``."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._received: list[int] = []
        # The loop sleeps in ZeroMQ's poll: a byte on this pipe wakes it.
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        service.loop.watch(self._read_fd, self._stop)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received.append(number)
        if len(self._received) > 1:
            self._service.supervisor.kill()
            os._exit(128 + number)

    def _stop(self) -> None:
        os.read(self._read_fd, 64)
        if self._received:
            self._service.stop(f"signal {signal.Signals(self._received[0]).name}")
