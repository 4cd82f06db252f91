"""Forks, copies and closed clients: every use of what belongs to another process or has ended is refused at once."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from xditd.client import AsyncClient, BadRequest, Client, Closed, Unsupported, XditdError  # noqa: E402
from xditd.client.pipeline.futures import Threads  # noqa: E402
from xditd.ipc.replies import Failed, Farewell  # noqa: E402
from xditd.ipc.requests import Generate, Goodbye, ReturnLoan  # noqa: E402

TEXT = {"prompt_embeds": torch.zeros(1, 2, 8), "pooled_prompt_embeds": torch.zeros(1, 4)}
WEIGHTS = {"double_blocks.0.img_mlp.0.weight": torch.ones(3, 4)}


def in_fork(function: Callable[[], Any]) -> str:
    """Return the error of a function in a fork, or ``done``; a fork that hangs ends after 20 s, without an answer."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        found = "done"
        try:
            function()
        except BaseException as error:  # noqa: BLE001 (its parent gets it)
            found = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, found.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as answer:
        return answer.read().decode()


def start(client: Client) -> Any:
    return client.generate("c1", TEXT, height=32, width=32, steps=1)


def test_every_use_in_a_fork_is_refused_whatever_lock_was_held(daemon: Any, folder: Path) -> None:
    daemon.answers[Generate] = lambda request: []
    with Client(folder) as client:
        loan, job = client.lend(WEIGHTS), start(client)
        session, held = client._current(), threading.Event()
        locks = (client._lifetime._lock, client._pool._lock, session._lock, session.connection._io._lock)
        release = threading.Event()

        def hold() -> None:
            for lock in locks:
                lock.acquire()
            held.set()
            release.wait(60)
            for lock in locks:
                lock.release()

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(20)
        uses = (client.status, lambda: client.lend(WEIGHTS), lambda: start(client), loan.return_, job.result)
        try:
            for use in uses:
                says = in_fork(use)
                assert says.startswith(f"Unsupported: this client was made by process {os.getpid()}"), says
                assert says.endswith("make a new Client after the fork")
            for end in (client.close, job.cancel, lambda: job.__exit__(None, None, None)):
                assert in_fork(end) == "done"
        finally:
            release.set()
            holder.join(20)
        assert not daemon.requests(Goodbye)
        assert not daemon.requests(ReturnLoan)
        assert in_fork(lambda: Client(folder).close()) == "done"


def test_threads_of_a_pipeline_and_of_an_async_client_are_not_waited_for_in_a_fork(daemon: Any, folder: Path) -> None:
    threads = Threads()
    assert threads.submit(lambda: 1).result(20) == 1
    says = in_fork(lambda: threads.submit(lambda: 1).result())
    assert says.startswith("Unsupported: this pipeline was made by process")
    threads.close()

    async def use() -> tuple[str, str]:
        async with AsyncClient(folder) as client:
            await client.status()

            def alone(method: Callable[[], Any]) -> None:
                asyncio._set_running_loop(None)  # the fork's own loop
                asyncio.run(method())

            return in_fork(lambda: alone(client.status)), in_fork(lambda: alone(client.close))

    says, closed = asyncio.run(use())
    assert says.startswith("Unsupported: this AsyncClient was made by process")
    assert closed == "done"


def test_an_async_client_is_opened_once(daemon: Any, folder: Path) -> None:
    async def twice() -> AsyncClient:
        async with AsyncClient(folder) as client:
            with pytest.raises(BadRequest, match="this AsyncClient is open already; share it, or make another one"):
                async with client:
                    pass
            await client.status()
        return client

    async def again(client: AsyncClient) -> None:
        for use in (client.__aenter__, client.status):
            with pytest.raises(Closed, match="this AsyncClient is closed, by close"):
                await use()

    asyncio.run(again(asyncio.run(twice())))
    assert len(daemon.requests(Goodbye)) == 1


def test_nothing_of_a_client_is_pickled_or_copied(daemon: Any, folder: Path) -> None:
    daemon.answers[Generate] = lambda request: []
    with Client(folder) as client, client.lend(WEIGHTS) as loan, start(client) as job:
        for each in (client, loan, loan.with_loras([]), job, AsyncClient(folder)):
            for use in (ForkingPickler.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(Unsupported, match=f"{type(each).__name__}: it cannot be pickled or copied; make a"):
                    use(each)
        with pytest.raises(XditdError, match="loras: 5 is of type int"):
            loan.with_loras([]).with_loras(5)  # type: ignore[arg-type]


def test_a_job_of_another_thread_ends_with_closed_when_its_client_is_closed(daemon: Any, folder: Path) -> None:
    jobs: list[str] = []

    def generate(request: Any) -> list[Any]:
        jobs.append(request.request_id)
        return []

    def goodbye(request: Any) -> list[Any]:  # as the daemon does: the jobs lose their loans first
        lost = [Failed(request_id=each, code="lease_lost", detail="the client is gone") for each in jobs]
        return [*lost, Farewell(request_id=request.request_id)]

    daemon.answers |= {Generate: generate, Goodbye: goodbye}
    client = Client(folder)
    job, found = start(client), []

    def wait() -> None:
        try:
            job.result()
        except XditdError as error:
            found.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    daemon.wait_for(Generate)
    client.close()
    waiting.join(20)
    assert [type(each) for each in found] == [Closed]
    assert "this client was closed before it was done; make a new Client" in str(found[0])
    client.close()
    with pytest.raises(Closed):
        start(client)


def test_a_close_that_is_interrupted_leaves_no_session(daemon: Any, folder: Path, open_memfds: Any) -> None:
    before = open_memfds()

    def interrupt(request: Any) -> list[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return []

    daemon.answers[Goodbye] = interrupt
    client = Client(folder)
    client.lend({name: each.clone() for name, each in WEIGHTS.items()})
    io = client._current().connection._io
    with pytest.raises(KeyboardInterrupt):
        client.close()
    assert not io.thread.is_alive()
    assert open_memfds() == before
    client.close()


def test_a_client_that_is_interrupted_while_its_thread_starts_leaves_none(
    daemon: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any, open_fds: Callable[[], int]
) -> None:
    def have_ended() -> bool:
        return not any(each.name == "xditd-connection" for each in threading.enumerate())

    Client(folder).close()
    wait_until(have_ended)  # clients that earlier tests left to the garbage collector close theirs in these threads
    before, begin = open_fds(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        begin(thread)
        if thread.name == "xditd-connection":
            raise KeyboardInterrupt  # as Ctrl-C does while Python waits for the thread

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            Client(folder)
    wait_until(have_ended)
    wait_until(lambda: open_fds() == before)
