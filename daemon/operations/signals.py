"""Signal handlers: SIGTERM and SIGINT stop the daemon, a second one kills it; SIGHUP reloads the configuration."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from xditd.daemon.operations.event_loop import EventLoop


class Signals:
    """Install the signal handlers. ``stop`` receives the reason; ``kill`` kills the workers.

    ``reload`` is ``None`` without a service manager: SIGHUP then means that the terminal was closed, and stops the
    daemon unless it is ignored (``nohup``).
    """

    def __init__(
        self,
        loop: EventLoop,
        stop: Callable[[str], None],
        kill: Callable[[], None],
        reload: Callable[[], None] | None,
    ) -> None:
        self._stop = stop
        self._kill = kill
        self._reload = reload
        self._stops: list[int] = []
        self._has_reload = False
        # A byte on this pipe wakes the loop from ZeroMQ's poll.
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        loop.watch(self._read_fd, self._on_wakeup)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive_stop)
        if reload is not None:
            signal.signal(signal.SIGHUP, self._receive_reload)
        elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup(1)
            signal.signal(signal.SIGHUP, self._receive_stop)

    def _receive_stop(self, number: int, _: FrameType | None) -> None:
        self._stops.append(number)
        if len(self._stops) > 1:
            self._kill()
            os._exit(128 + number)

    def _receive_reload(self, *_: object) -> None:
        self._has_reload = True

    def _on_wakeup(self) -> None:
        os.read(self._read_fd, 64)
        if self._stops:
            self._stop(f"signal {signal.Signals(self._stops[0]).name}")
        elif self._has_reload and self._reload is not None:
            self._has_reload = False
            self._reload()
