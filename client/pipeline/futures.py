"""Calls of a pipeline in threads: futures whose ``cancel()`` also cancels a job that runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Final, TypeVar

from xditd.client.forks import Maker
from xditd.client.jobs.job_scopes import JobScope, run_in
from xditd.client.loop_futures import LoopWatch, awaited
from xditd.ipc.errors import Cancelled, Closed

T = TypeVar("T")

MAX_AT_ONCE: Final = 16
"""Calls in threads at the same time; others wait for their turn in this process."""


class RunFuture(Future[T]):
    """A future of a call. ``cancel()`` of one that runs cancels its job: ``result()`` then raises ``Cancelled``."""

    def __init__(self) -> None:
        super().__init__()
        self._scope = JobScope()

    def cancel(self) -> bool:
        """Cancel the call; returns whether it had not begun."""
        if super().cancel():
            return True
        self._scope.cancel()
        return False

    def run(self, function: Callable[[], T]) -> None:
        """Run the call in this thread, unless it was cancelled."""
        if not self.set_running_or_notify_cancel():
            return
        try:
            found = run_in(self._scope, function)
        except BaseException as error:  # noqa: BLE001 (its taker gets it)
            self.set_exception(error)
        else:
            self.set_result(found)


class Threads:
    """The threads of a pipeline, made with the first call that needs one."""

    def __init__(self) -> None:
        self.maker = Maker("pipeline", "open it again")
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._running: set[RunFuture[object]] = set()
        self._inside: set[int] = set()
        """The threads that run a call, or a callback of one."""
        self._loops = LoopWatch()
        self._is_closed = False

    def submit(self, function: Callable[[], T]) -> RunFuture[T]:
        """Run a function in a thread.

        Raises:
            Closed: the pipeline is closed.
            Unsupported: this is a fork of the process that opened it.
        """
        self.maker.check()
        future: RunFuture[T] = RunFuture()
        with self._lock:
            if self._is_closed:
                raise Closed("this pipeline is closed; open it again")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="xditd-pipeline")
            self._running.add(future)  # type: ignore[arg-type]
            self._pool.submit(self._run, future, function)
        future.add_done_callback(self._forget)
        return future

    async def awaited(self, future: RunFuture[T], purpose: str) -> T:
        """Wait for a future in an event loop. Its call is cancelled with the task, and if the loop is closed first.

        Raises:
            Cancelled: another thread cancelled the call before it had begun, as ``close`` does.
        """
        self._loops.add(future, asyncio.get_running_loop())
        try:
            return await awaited(future, purpose)
        except CancelledError:
            raise Cancelled(f"{purpose}: cancelled before it had begun, or its pipeline was closed") from None
        except BaseException:  # also GeneratorExit, of a task that is dropped
            future.cancel()
            raise

    def _run(self, future: RunFuture[T], function: Callable[[], T]) -> None:
        self._inside.add(threading.get_ident())
        try:
            future.run(function)
        finally:
            self._inside.discard(threading.get_ident())

    def _forget(self, future: Future[T]) -> None:
        with self._lock:
            self._running.discard(future)

    def close(self) -> None:
        """Cancel all calls, and wait for the threads, unless one of them calls this. May be called twice."""
        with self._lock:
            self._is_closed = True
            running, pool, self._pool = list(self._running), self._pool, None
        for future in running:
            future.cancel()
        if pool is not None:
            pool.shutdown(wait=threading.get_ident() not in self._inside)
