"""Single-threaded event loop: ZeroMQ sockets, file descriptors, timers and deadlines."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import select
import time
from collections.abc import Callable
from typing import Any

import zmq

from xditd.ipc.awake_clock import TICK_S, AwakeClock

logger = logging.getLogger(__name__)

Callback = Callable[[], None]


class Timer:
    """A callback at ``due_s`` of the monotonic clock, unless it is cancelled before."""

    def __init__(self, due_s: float, callback: Callback) -> None:
        self.due_s = due_s
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class Deadline:
    """Call ``on_missed`` when ``allowed_s`` have passed without :meth:`extend` or :meth:`stop`.

    If the loop itself stood still, the whole time starts again: it cannot know what other processes would have done.
    One timer serves all extensions: there may be hundreds a second, and a timer of each would stay for minutes.
    """

    def __init__(self, loop: EventLoop, on_missed: Callback) -> None:
        self._loop = loop
        self._on_missed = on_missed
        self._since_s = 0.0
        self._allowed_s = 0.0
        self._timer: Timer | None = None

    @property
    def waited_s(self) -> float:
        """Seconds since the last extension."""
        return self._loop.clock.waited_s(self._since_s)

    @property
    def overdue_s(self) -> float:
        """Seconds by which the deadline is missed; 0 before it, and once it is stopped."""
        return 0.0 if self._timer is None else max(0.0, self.waited_s - self._allowed_s)

    def extend(self, allowed_s: float) -> Deadline:
        """Set the deadline to ``allowed_s`` from now; returns ``self``."""
        self._since_s, self._allowed_s = self._loop.clock.now_s(), allowed_s
        if self._timer is not None and self._timer.due_s > time.monotonic() + allowed_s:
            self.stop()
        if self._timer is None:
            self._timer = self._loop.call_later(allowed_s, self._check)
        return self

    def stop(self) -> None:
        """Stop waiting: ``on_missed`` is not called."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        rest_s = self._allowed_s - self.waited_s
        if rest_s > 0:
            self._timer = self._loop.call_later(rest_s, self._check)
        else:
            self._on_missed()


class EventLoop:
    """Call the callbacks of readable sockets and descriptors and of due timers, then ``after_round``.

    ``clock`` measures how long other processes have been silent. Timers use the monotonic clock: after a standstill
    they are overdue, and run at once.

    Plain descriptors are in one epoll set, which ZeroMQ polls as a single descriptor: a round takes as long with a
    hundred client processes as with one.
    """

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._sockets: dict[zmq.Socket[bytes], Callback] = {}
        self._epoll = select.epoll()
        self._descriptors: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._is_running = False
        self.clock = AwakeClock()
        self._poller.register(self._epoll.fileno(), zmq.POLLIN)

    def watch_socket(self, socket: zmq.Socket[bytes], callback: Callback) -> None:
        """Call back while messages wait; a callback that does not read all of them is called again."""
        self._sockets[socket] = callback
        self._poller.register(socket, zmq.POLLIN)

    def watch(self, descriptor: int, callback: Callback, *, writable: bool = False) -> None:
        """Call back while the descriptor is readable or at its end; with ``writable``, while writable or broken."""
        self._descriptors[descriptor] = callback
        self._epoll.register(descriptor, select.EPOLLOUT if writable else select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching; call this before the descriptor is closed."""
        if self._descriptors.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Call back after ``delay_s``. To wait for another process, use :meth:`deadline`."""
        timer = Timer(time.monotonic() + delay_s, callback)
        heapq.heappush(self._timers, (timer.due_s, next(self._numbers), timer))
        return timer

    def deadline(self, allowed_s: float, on_missed: Callback) -> Deadline:
        """Start a deadline for another process."""
        return Deadline(self, on_missed).extend(allowed_s)

    def run(self, after_round: Callback) -> None:
        """Run until :meth:`stop`."""
        self._is_running = True
        self.clock.now_s()
        while self._is_running:
            ready: dict[Any, int] = dict(self._poller.poll(self._poll_timeout_ms()))
            self._notice_standstill()
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

    def _poll_timeout_ms(self) -> int:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        timeout_s = min(TICK_S, self._timers[0][0] - time.monotonic()) if self._timers else TICK_S
        # Rounded up: a poll that ends a fraction of a millisecond early would spin until the timer is due.
        return max(0, math.ceil(timeout_s * 1000))

    def _notice_standstill(self) -> None:
        before_s = self.clock.stood_still_s
        self.clock.now_s()
        stood_still_s = self.clock.stood_still_s - before_s
        if stood_still_s > 0:
            logger.warning(
                "the daemon's loop stood still for %.1f s (stopped, frozen or starved); every deadline starts again",
                stood_still_s,
            )

    def _call_descriptors(self, is_any_ready: bool) -> None:
        if not is_any_ready:
            return
        ready = [(descriptor, self._descriptors.get(descriptor)) for descriptor, _ in self._epoll.poll(0)]
        for descriptor, callback in ready:
            # An earlier callback of this round may have closed the descriptor, and its number may have been reused.
            if callback is not None and self._descriptors.get(descriptor) is callback:
                callback()

    def _call_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                callback, timer.callback = timer.callback, None
                callback()
