"""Signals: SIGTERM and SIGINT stop the daemon, a second one ends it at once; SIGHUP reloads the configuration."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from xditd.daemon.front.service import Service


class Signals:
    """Handle this process's signals for ``service``.

    ``reload`` is ``None`` where no service manager is: SIGHUP then means that the terminal is gone, and stops the
    daemon unless it was started to ignore that (``nohup``).
    """

    def __init__(self, service: Service, reload: Callable[[], None] | None) -> None:
        self._service = service
        self._reload = reload
        self._stops: list[int] = []
        self._has_reload = False
        # The loop sleeps in ZeroMQ's poll: a byte on this pipe wakes it.
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        service.loop.watch(self._read_fd, self._act)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive_stop)
        if reload is not None:
            signal.signal(signal.SIGHUP, self._receive_reload)
        elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1): the terminal may go
            signal.signal(signal.SIGHUP, self._receive_stop)

    def _receive_stop(self, number: int, _: FrameType | None) -> None:
        self._stops.append(number)
        if len(self._stops) > 1:
            self._service.supervisor.kill()
            os._exit(128 + number)

    def _receive_reload(self, *_: object) -> None:
        self._has_reload = True

    def _act(self) -> None:
        os.read(self._read_fd, 64)
        if self._stops:
            self._service.stop(f"signal {signal.Signals(self._stops[0]).name}")
        elif self._has_reload and self._reload is not None:
            self._has_reload = False
            self._reload()
