"""Futures of threads that an event loop waits for, also if the loop is closed before they are done."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from xditd.ipc.errors import XditdError

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S: Final = 0.5
"""Between two looks at an event loop: nothing reports that it is closed."""


async def awaited(future: Future[T], purpose: str) -> T:
    """Wait for a future of a thread, and return its result or raise its error, whatever that is.

    ``asyncio.wrap_future`` never ends if the error is ``StopIteration``, and turns a future that was cancelled into
    ``asyncio.CancelledError``, as if this task had been cancelled.

    Raises:
        concurrent.futures.CancelledError: the future was cancelled.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def wake(ended: Future[T]) -> None:
        try:
            loop.call_soon_threadsafe(_finish, done)
        except RuntimeError:  # the loop is closed
            error = None if ended.cancelled() else ended.exception()
            if done.cancelled() and (error is None or isinstance(error, XditdError)):
                return  # its task was cancelled, and has ended with that
            frames = None if isinstance(error, XditdError) else error
            logger.warning(
                "nobody takes the result of %s: its event loop is closed error=%s", purpose, error, exc_info=frames
            )

    future.add_done_callback(wake)
    await done
    return future.result()


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():  # else its task was cancelled
        done.set_result(None)


class LoopWatch:
    """Cancels futures whose event loop is closed before they are done: nobody could take their results.

    One thread looks at the loops, while there are such futures.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._loops: dict[Future[Any], asyncio.AbstractEventLoop] = {}
        self._is_running = False

    def add(self, future: Future[Any], loop: asyncio.AbstractEventLoop) -> None:
        """Watch the loop of a future until the future is done."""
        with self._changed:
            self._loops[future] = loop
            if not self._is_running:
                threading.Thread(target=self._run, name="xditd-loop-watch", daemon=True).start()
                self._is_running = True
        future.add_done_callback(self._discard)

    def _discard(self, future: Future[Any]) -> None:
        with self._changed:
            self._loops.pop(future, None)
            self._changed.notify_all()

    def _run(self) -> None:
        while closed := self._wait():
            for future in closed:
                future.cancel()

    def _wait(self) -> list[Future[Any]]:
        """Wait for a loop to be closed; returns its futures, or none once there is no future to watch."""
        with self._changed:
            while self._loops:
                closed = [future for future, loop in self._loops.items() if loop.is_closed()]
                if closed:
                    for future in closed:
                        del self._loops[future]
                    return closed
                self._changed.wait(LOOK_S)
            self._is_running = False
            return []
