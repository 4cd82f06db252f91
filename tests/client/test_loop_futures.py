"""Futures of threads in event loops: every error arrives, and a loop that is closed cancels what it waited for."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import CancelledError, Future

import pytest

from xditd.client.loop_futures import LoopWatch, awaited
from xditd.client.pipeline.futures import Threads
from xditd.ipc.errors import Cancelled, Closed


def test_results_and_errors_arrive() -> None:
    async def both() -> int:
        right: Future[int] = Future()
        threading.Timer(0.01, right.set_result, (3,)).start()
        wrong: Future[int] = Future()
        threading.Timer(0.01, wrong.set_exception, (KeyError("a"),)).start()
        with pytest.raises(KeyError):
            await awaited(wrong, "a call")
        return await awaited(right, "a call")

    assert asyncio.run(both()) == 3


def test_a_stop_iteration_does_not_keep_the_task_waiting() -> None:
    """``asyncio.wrap_future`` cannot set it, and its future is never done."""

    async def one() -> None:
        future: Future[int] = Future()
        threading.Timer(0.01, future.set_exception, (StopIteration(),)).start()
        await asyncio.wait_for(awaited(future, "a call"), 20)

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(one())


def test_a_future_that_was_cancelled_does_not_cancel_the_task() -> None:
    async def one() -> bool:
        future: Future[int] = Future()
        threading.Timer(0.01, future.cancel).start()
        with pytest.raises(CancelledError):
            await awaited(future, "a call")
        return True

    assert asyncio.run(one())


def test_a_task_that_was_cancelled_before_its_loop_was_closed_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As ``asyncio.run`` does at Ctrl-C."""
    future: Future[int] = Future()

    async def one() -> None:
        task = asyncio.ensure_future(awaited(future, "a call"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(one())
    future.set_exception(Cancelled("request 1 was cancelled by its client"))
    assert not caplog.records


def test_a_loop_that_is_closed_cancels_its_futures(caplog: pytest.LogCaptureFixture) -> None:
    watch, loop = LoopWatch(), asyncio.new_event_loop()
    lost: Future[int] = Future()
    kept: Future[int] = Future()
    watch.add(lost, loop)
    watch.add(kept, (other := asyncio.new_event_loop()))
    cancelled = threading.Event()
    task = loop.create_task(awaited(lost, "a call"))
    loop.call_soon(loop.stop)
    loop.run_forever()
    lost.add_done_callback(lambda _: cancelled.set())  # after that of the task, which warns
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio warns of the task, which is meant
    with caplog.at_level(logging.WARNING, "xditd.client.loop_futures"):
        loop.close()
        assert cancelled.wait(20)
    assert lost.cancelled()
    assert "nobody takes the result of a call: its event loop is closed" in caplog.text
    assert not kept.done()
    kept.set_result(1)
    for thread in threading.enumerate():
        if thread.name == "xditd-loop-watch":
            thread.join(20)
            assert not thread.is_alive()
    other.close()


def test_threads_that_are_closed_by_one_of_them() -> None:
    """By a callback of a call, or of a future."""
    for close_in_callback in (False, True):
        threads = Threads()
        closed = threading.Event()

        def close(*_: object, threads: Threads = threads, closed: threading.Event = closed) -> int:
            threads.close()
            closed.set()
            return 1

        future = threads.submit((lambda: 1) if close_in_callback else close)
        if close_in_callback:
            future.add_done_callback(close)
        assert future.result(20) == 1
        assert closed.wait(20)
        with pytest.raises(Closed):
            threads.submit(close)
