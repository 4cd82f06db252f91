"""Models that nobody uses are returned after a while: ``keep_alive``."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable

from xditd.ipc.errors import XditdError


class KeepAlive:
    """Count the calls that run, and call ``unload``, in a thread, once none has begun for ``seconds``.

    ``unload`` is a method, and its object is not kept alive. ``None`` seconds: never. Safe to use from several threads.
    """

    def __init__(self, seconds: float | None, unload: Callable[[], object]) -> None:
        self._seconds = seconds
        self._unload = weakref.WeakMethod(unload)
        self._lock = threading.Lock()
        self._running = 0
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """A call begins."""
        with self._lock:
            self._running += 1
            self._cancel()

    def end(self) -> None:
        """A call that had begun has ended."""
        with self._lock:
            self._running -= 1
            if self._running or self._seconds is None:
                return
            self._cancel()
            unload = self._unload
            self._timer = threading.Timer(self._seconds, lambda: _call(unload()))
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """Unload nothing until another call ends."""
        with self._lock:
            self._cancel()

    def close(self) -> None:
        """Unload nothing any more."""
        with self._lock:
            self._seconds = None
            self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _call(function: Callable[[], object] | None) -> None:
    if function is not None:
        with contextlib.suppress(XditdError):  # the daemon has gone, and the loans with it
            function()
