"""One mailbox for each request: a queue of the daemon's replies for the thread that waits for them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

from xditd.ipc.awake_clock import TICK_S, AwakeClock
from xditd.ipc.errors import DeadlineExceeded, PeerError, XditdError, error_for
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import AnyEvent, AnyReply, Failed, FramesDecoded, Queued, StepDone

R = TypeVar("R", bound=Reply)

Ending = AnyReply | XditdError
"""The last item of a request: its reply, ``Failed``, or the error of a lost connection."""


@dataclass(frozen=True)
class Timeouts:
    """How long to wait: ``silence_s`` for the next event or reply, ``total_s`` in total (``None``: no limit)."""

    silence_s: float
    total_s: float | None = None


class Mailbox:
    """The connection's thread puts replies in, others take them: each event once, the last one as often as they ask.

    ``clock`` is the connection's.
    """

    def __init__(self, request_id: str, purpose: str, clock: AwakeClock) -> None:
        self.request_id = request_id
        self.purpose = purpose
        self._items: SimpleQueue[Ending] = SimpleQueue()
        self._lock = threading.Lock()
        self._ending: Ending | None = None
        self._on_ending: Callable[[Ending], None] | None = None
        self._clock = clock
        self._started_s = clock.now_s()
        self._last_event = ""

    @property
    def is_ended(self) -> bool:
        """Whether the daemon will send nothing more for this request."""
        return self._ending is not None

    def deliver(self, item: Ending) -> bool:
        """Put an event or a reply in, on the connection's thread. Returns whether the request has ended."""
        if isinstance(item, AnyEvent):
            self._items.put(item)
            return False
        with self._lock:
            self._ending = item
            callback = self._on_ending
        self._items.put(item)
        if callback is not None:
            callback(item)
        return True

    def when_ended(self, callback: Callable[[Ending], None]) -> None:
        """Call ``callback`` once with the last item: now if the request has ended, else on the connection's thread."""
        with self._lock:
            ending = self._ending
            if ending is None:
                self._on_ending = callback
        if ending is not None:
            callback(ending)

    def take(self, timeouts: Timeouts) -> AnyReply:
        """Wait for the next event or reply.

        Raises:
            DeadlineExceeded: ``silence_s`` or ``total_s`` is over.
            XditdError: the connection was lost.
        """
        began_s = self._clock.now_s()
        while True:
            rest_s = timeouts.silence_s - self._clock.waited_s(began_s)
            if timeouts.total_s is not None:
                rest_s = min(rest_s, timeouts.total_s - self._clock.waited_s(self._started_s))
            # In short waits, because the clock does not count the time that this process was suspended.
            with contextlib.suppress(Empty):
                item = self._items.get(timeout=min(TICK_S, max(0.0, rest_s)))
                if not isinstance(item, AnyEvent):
                    self._items.put(item)  # another thread may wait, too
                return self._record_event(item)
            if rest_s <= 0:
                raise self._deadline_error(began_s, timeouts)

    def _deadline_error(self, began_s: float, timeouts: Timeouts) -> DeadlineExceeded:
        now_s = self._clock.now_s()
        is_total = timeouts.total_s is not None and now_s - self._started_s >= timeouts.total_s
        limit = "the call's" if is_total else "the client's"
        total, silent = _seconds(now_s - self._started_s), _seconds(now_s - began_s)
        if not self._last_event:
            state = f"no answer from the daemon for {silent}, {total} after the request; no event was received"
        elif is_total:  # the daemon has answered, also just now
            state = f"not done {total} after the request; {self._last_event}, {silent} ago"
        else:
            state = f"no answer from the daemon for {silent}, {total} after the request; {self._last_event}"
        return DeadlineExceeded(f"{self.purpose}: {state}; see xditd status, or raise {limit} deadline_s")

    def _record_event(self, item: Ending) -> AnyReply:
        if isinstance(item, XditdError):
            raise item
        if isinstance(item, Queued):
            self._last_event = f"last event: {item.ahead} jobs ahead in the queue, {item.reason or 'waiting'}"
        elif isinstance(item, StepDone):
            self._last_event = f"last event: step {item.step} of {item.total_steps}"
        elif isinstance(item, FramesDecoded):
            self._last_event = f"last event: frame {item.frames} of {item.total_frames} decoded"
        return item

    def wait(self, reply_type: type[R], timeouts: Timeouts, on_event: Callable[[AnyEvent], None] | None = None) -> R:
        """Wait for the reply; ``on_event`` is called with each event before it.

        Raises:
            XditdError: the error that the daemon answered, by its code; or as :meth:`take`.
        """
        while True:
            item = self.take(timeouts)
            if isinstance(item, AnyEvent):
                if on_event is not None:
                    on_event(item)
                continue
            return expect(item, reply_type, self.purpose)


def _seconds(value_s: float) -> str:
    return f"{value_s:.1f} s" if value_s >= 0.1 else f"{value_s * 1e3:.0f} ms"


def expect(reply: AnyReply, reply_type: type[R], purpose: str) -> R:
    """Return a reply of the expected type, or raise the error that a ``Failed`` describes."""
    if isinstance(reply, reply_type):
        return reply
    if isinstance(reply, Failed):
        raise error_for(reply.code, reply.detail, reply.retry_after_s, reply.names)
    raise PeerError(f"{purpose}: the daemon answered {type(reply).__name__} instead of {reply_type.__name__}")
