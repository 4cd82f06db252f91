"""Tell the service manager how the daemon is: systemd's notify protocol (``sd_notify``), in its few lines.

A library for this (``sdnotify``, ``systemd-python``) would be one more thing in the client's environment, for one
datagram; the protocol is frozen.

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
"""What the daemon gets, beyond a deadline of its own, to end a group that has gone silent."""


class ServiceManager:
    """Send the daemon's state to ``NOTIFY_SOCKET``; without one, every call does nothing.

    ``watchdog_s`` is how often the manager wants to hear from us before it ends the daemon, 0 where it does not.
    """

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        """Read the manager's variables.

        Raises:
            BadRequest: a variable does not hold what the protocol says.
        """
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
        """Say that the daemon is ready once ``loop`` turns, and keep the watchdog informed from then on.

        A timer of the loop sends the keep-alive, so one that does not turn sends none. Nor is one sent while a worker
        group is silent long after its deadline (``overdue_s``): the daemon should have ended it, and has not.
        """
        loop.call_later(0, lambda: self.ready(status))
        if self.watchdog_s:
            self._keep_alive(loop, overdue_s)

    def reload(self, apply: Callable[[], str]) -> None:
        """Announce, ``apply``, and announce the end with what it returned."""
        self.reloading()
        self.ready(apply())

    def ready(self, status: str) -> None:
        """The clients' socket answers. Also ends :meth:`reloading`."""
        self._send("READY=1", f"STATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={_one_line(status)}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """The configuration is read again, from now on until :meth:`ready`."""
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
        # A manager that is being restarted, or whose queue is full, is no reason to wait or to end: it asks again.
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(assignments).encode(), self._address)


def _address(text: str) -> str:
    """Spell the address for ``sendto``: a path, or an abstract name, which systemd writes with ``@`` in front."""
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
    """A newline would begin another assignment."""
    return " ".join(text.split())[:1000]


def service_manager_of_this_process() -> ServiceManager:
    """Take the variables out of the environment, so that no child of ours can speak in our name."""
    manager = ServiceManager(os.environ, os.getpid())
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        os.environ.pop(name, None)
    return manager
