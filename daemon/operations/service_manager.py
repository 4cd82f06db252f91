"""Notify systemd of the daemon's state (``sd_notify``) and keep its watchdog informed.

Without a library (``sdnotify``, ``systemd-python``): the protocol is one datagram, and stable.

Source: sd_notify(3), "Standalone Implementations" and "Well-Known Assignments"; sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final

from xditd.daemon.operations.event_loop import EventLoop
from xditd.ipc.errors import BadRequest

logger = logging.getLogger(__name__)

OVERDUE_GRACE_S: Final = 30.0
"""How long the daemon has to end a worker group that missed its deadline."""


class ServiceManager:
    """Send the daemon's state to ``NOTIFY_SOCKET``; without that variable, every method does nothing.

    ``watchdog_s`` is the watchdog's timeout (``WATCHDOG_USEC``), 0 without one.
    """

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        """Read the service manager's variables; raises ``BadRequest`` for a malformed one."""
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(environ, pid) if self._address else 0.0
        self._is_withheld = False
        self._socket: socket.socket | None = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    @property
    def is_enabled(self) -> bool:
        return self._socket is not None

    def begin(self, loop: EventLoop, status: str, overdue_s: Callable[[], float]) -> None:
        """Report the daemon as ready once ``loop`` runs, and send the watchdog's keep-alive from a timer of the loop.

        No keep-alive is sent while a worker group has exceeded its deadline by far (``overdue_s``): the daemon should
        have ended it.
        """
        loop.call_later(0, lambda: self.ready(status))
        if self.watchdog_s:
            self._keep_alive(loop, overdue_s)

    def reload(self, apply: Callable[[], str]) -> None:
        """Notify of a reload, run ``apply``, and notify of its end with the text that it returns."""
        self.reloading()
        self.ready(apply())

    def ready(self, status: str) -> None:
        """Notify that clients are served; also ends :meth:`reloading`."""
        self._send("READY=1", f"STATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={_one_line(status)}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """Notify that the configuration is being reloaded, until :meth:`ready`."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", f"STATUS={_one_line(status)}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _keep_alive(self, loop: EventLoop, overdue_s: Callable[[], float]) -> None:
        overdue_for_s = overdue_s()
        if overdue_for_s <= OVERDUE_GRACE_S:
            self._is_withheld = False
            self.alive()
        elif not self._is_withheld:
            self._is_withheld = True
            logger.error(
                "no keep-alive to the watchdog: the worker group is %.0f s over its deadline and has not been ended; "
                "the service manager restarts the daemon",
                overdue_for_s,
            )
        # Twice in each interval, as sd_watchdog_enabled(3) recommends.
        loop.call_later(self.watchdog_s / 2, lambda: self._keep_alive(loop, overdue_s))

    def _send(self, *assignments: str) -> None:
        # Do not wait or fail if the service manager is being restarted or its queue is full.
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(assignments).encode(), self._address)


def _address(text: str) -> str:
    """Convert ``NOTIFY_SOCKET`` to an address for ``sendto``: a path, or an abstract name (``@`` in systemd)."""
    if text.startswith("@"):
        return "\0" + text[1:]
    if text and not text.startswith("/"):
        raise BadRequest(f"NOTIFY_SOCKET={text!r}: use a path or an abstract socket (@name), or unset it")
    return text


def _watchdog_s(environ: Mapping[str, str], pid: int) -> float:
    microseconds = environ.get("WATCHDOG_USEC", "")
    meant_for = environ.get("WATCHDOG_PID", "") or str(pid)
    if not microseconds or meant_for != str(pid):
        return 0.0
    if not microseconds.isdecimal() or not int(microseconds):
        raise BadRequest(f"WATCHDOG_USEC={microseconds!r}: use a whole number of microseconds above 0, or unset it")
    return int(microseconds) / 1e6


def _one_line(text: str) -> str:
    """Join lines: a newline would begin another assignment."""
    return " ".join(text.split())[:1000]


def service_manager_of_this_process() -> ServiceManager:
    """Read this process's variables and remove them from the environment, so that no child notifies in its name."""
    manager = ServiceManager(os.environ, os.getpid())
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        os.environ.pop(name, None)
    return manager
