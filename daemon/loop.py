"""One thread, one loop: ZeroMQ sockets, file descriptors and timers."""

from __future__ import annotations

import heapq
import itertools
import math
import select
import time
from collections.abc import Callable
from typing import Any

import zmq

Callback = Callable[[], None]


class Timer:
    """A callback that is due at ``due_s`` of the monotonic clock, unless it is cancelled before."""

    def __init__(self, due_s: float, callback: Callback) -> None:
        self.due_s = due_s
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Call back for what is readable and what is due; after each round call ``after_round``.

    Plain descriptors sit in one epoll set, which ZeroMQ polls as a single descriptor: a round costs
    the same with one client process to watch as with a hundred.
    """

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._sockets: dict[zmq.Socket[bytes], Callback] = {}
        self._epoll = select.epoll()
        self._descriptors: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._is_running = False
        self._poller.register(self._epoll.fileno(), zmq.POLLIN)

    def watch_socket(self, socket: zmq.Socket[bytes], callback: Callback) -> None:
        """Call back while a message waits; a callback that leaves some behind is called again."""
        self._sockets[socket] = callback
        self._poller.register(socket, zmq.POLLIN)

    def watch(self, descriptor: int, callback: Callback, *, writable: bool = False) -> None:
        """Call back while the descriptor is readable or at its end, or, if that is asked, ``writable`` or broken."""
        self._descriptors[descriptor] = callback
        self._epoll.register(descriptor, select.EPOLLOUT if writable else select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching; call this before the descriptor is closed."""
        if self._descriptors.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        timer = Timer(time.monotonic() + delay_s, callback)
        heapq.heappush(self._timers, (timer.due_s, next(self._numbers), timer))
        return timer

    def run(self, after_round: Callback) -> None:
        """Run until :meth:`stop`."""
        self._is_running = True
        while self._is_running:
            ready: dict[Any, int] = dict(self._poller.poll(self._patience_ms()))
            self._call_descriptors(self._epoll.fileno() in ready)
            for socket, callback in self._sockets.items():
                if socket in ready:
                    callback()
            self._call_timers()
            after_round()

    def stop(self) -> None:
        """Leave :meth:`run` after this round."""
        self._is_running = False

    def close(self) -> None:
        self._epoll.close()

    def _patience_ms(self) -> int | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        # Rounded up: waking a fraction of a millisecond early would spin until the timer is due.
        return max(0, math.ceil((self._timers[0][0] - time.monotonic()) * 1000))

    def _call_descriptors(self, is_any_ready: bool) -> None:
        if not is_any_ready:
            return
        ready = [(descriptor, self._descriptors.get(descriptor)) for descriptor, _ in self._epoll.poll(0)]
        for descriptor, callback in ready:
            # An earlier callback of this round may have closed the descriptor, and its number may be in use again.
            if callback is not None and self._descriptors.get(descriptor) is callback:
                callback()

    def _call_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                callback, timer.callback = timer.callback, None
                callback()
