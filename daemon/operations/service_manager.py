"""What the service manager hears: ready, what is going on, and that the daemon is alive and in charge."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.sd_notify import Notifier

logger = logging.getLogger(__name__)

OVERDUE_GRACE_S: Final = 30.0
"""What the daemon gets, beyond a deadline of its own, to end a group that has gone silent."""


class ServiceManager:
    """Tell the service manager how the daemon is.

    A timer of the loop sends the watchdog's keep-alive, so one that does not turn sends none. Nor is one sent while a
    worker group is silent long after its deadline (``overdue_s``): the daemon should have ended it, and has not.
    """

    def __init__(self, loop: EventLoop, notifier: Notifier, overdue_s: Callable[[], float]) -> None:
        self._loop = loop
        self._notifier = notifier
        self._overdue_s = overdue_s
        self._is_withheld = False

    def begin(self, status: str) -> None:
        """The clients' socket is bound, and the loop is about to turn."""
        self._loop.call_later(0, lambda: self._notifier.ready(status))
        if self._notifier.watchdog_s:
            self._keep_alive()

    def say(self, status: str) -> None:
        self._notifier.status(status)

    def reload(self, apply: Callable[[], str]) -> None:
        """Announce, ``apply``, and announce the end with what it returned."""
        self._notifier.reloading()
        self._notifier.ready(apply())

    def end(self, why: str) -> None:
        self._notifier.stopping(why)

    def _keep_alive(self) -> None:
        overdue_s = self._overdue_s()
        if overdue_s <= OVERDUE_GRACE_S:
            self._is_withheld = False
            self._notifier.alive()
        elif not self._is_withheld:
            self._is_withheld = True
            logger.error(
                "no keep-alive to the watchdog: the worker group is %.0f s over its deadline and has not been ended; "
                "the service manager restarts the daemon",
                overdue_s,
            )
        # Twice in each interval, as sd_watchdog_enabled(3) recommends.
        self._loop.call_later(self._notifier.watchdog_s / 2, self._keep_alive)
