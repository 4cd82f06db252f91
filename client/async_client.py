"""``AsyncClient``: the client for programs that run in an event loop.

Each method runs that of :class:`~xditd.client.client.Client` in a thread of its own pool, so both do the same.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, update_wrapper
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

from xditd.client.client import SILENCE_DEADLINE_S, Client
from xditd.client.forks import Maker, OfOneProcess
from xditd.client.jobs.generation import GenerationJob
from xditd.client.jobs.job_scopes import JobScope, run_in
from xditd.client.loans import Loan
from xditd.client.loop_futures import LOOK_S, awaited
from xditd.client.results import GenerationResult
from xditd.ipc.errors import BadRequest, Closed
from xditd.ipc.replies import AnyEvent, StepDone

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")

MAX_AT_ONCE: Final = 128
"""Methods that run at once; others wait for their turn in this process."""

_CLOSED: Final = "this AsyncClient is closed, by close() or with its event loop; make a new one"


def _asynchronous(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """Return the same method for an event loop."""

    async def run(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run(method, self._started(), *args, **kwargs)

    return update_wrapper(run, method)


def _starting(
    method: Callable[Concatenate[Client, P], GenerationJob],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, AsyncGenerationJob]]:
    """Return a method that starts a generation for an event loop."""

    async def start(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerationJob:
        return AsyncGenerationJob(self, await self.run(method, self._started(), *args, **kwargs))

    return update_wrapper(start, method)


class AsyncClient(OfOneProcess):
    """A :class:`Client` whose methods are awaited: the same names, arguments, results and errors.

    Use it as ``async with AsyncClient() as client``. Cancelling a task that waits for a job cancels the job in the
    workers, what a cancelled lend or ``generate`` would have returned is given back, and a cancelled return is made.
    ``at_once`` is the most methods that run at the same time. For one event loop; if that is closed first, so is the
    client, within a second.

    Raises (by ``__aenter__``): as :class:`Client` does; BadRequest: ``at_once`` is not a positive number.
    """

    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None = None,
        *,
        name: str = "python",
        deadline_s: float = SILENCE_DEADLINE_S,
        wait_s: float = 0.0,
        at_once: int = MAX_AT_ONCE,
    ) -> None:
        if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
            raise BadRequest(f"at_once: {at_once!r} is not a number of methods, 1 or more")
        self._connect = partial(Client, runtime_dir, name=name, deadline_s=deadline_s, wait_s=wait_s)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="xditd-async")
        self._client: Client | None = None
        self._scopes: set[JobScope] = set()
        self._has_begun = False
        self._is_closed = threading.Event()
        self._maker = Maker("AsyncClient", "make a new one")

    async def __aenter__(self) -> AsyncClient:
        if self._is_closed.is_set():
            raise Closed(_CLOSED)
        if self._has_begun:
            raise BadRequest("async with: this AsyncClient is open already; share it, or make another one")
        self._has_begun = True
        watch = partial(self._watch, asyncio.get_running_loop())
        threading.Thread(target=watch, name="xditd-async-watch", daemon=True).start()
        try:
            self._client = await self.run(self._connect)
        except BaseException:
            self._is_closed.set()
            self._threads.shutdown(wait=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all loans, jobs and the session, and wait for the threads. May be called twice."""
        await asyncio.shield(asyncio.to_thread(self._close))

    def _close(self) -> None:
        if not self._maker.is_here:
            return
        self._is_closed.set()
        client, self._client = self._client, None
        for scope in tuple(self._scopes):
            scope.cancel()
        if client is not None:
            client.close()
        self._threads.shutdown()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the client if its loop is closed before: threads that wait keep the tasks that wait for them."""
        while not self._is_closed.wait(LOOK_S):
            if loop.is_closed():
                self._close()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that waits, such as ``loan.return_``, in a thread; cancelling cancels the jobs it sent."""
        self._maker.check()
        if not callable(function):
            raise BadRequest(
                f"run: {function!r:.100} of type {type(function).__name__} cannot be called; give a function"
            )
        scope = JobScope()
        try:
            future = self._threads.submit(run_in, scope, partial(function, *args, **kwargs))
        except RuntimeError:
            raise Closed(_CLOSED) from None
        self._scopes.add(scope)
        future.add_done_callback(lambda _: self._scopes.discard(scope))
        try:
            return await awaited(future, getattr(function, "__name__", "a function"))
        except BaseException:  # cancelled: nobody takes the result
            # A return is made even if it had not begun: its caller has usually dropped the loan.
            if _is_return(function) or not future.cancel():
                scope.cancel()
                future.add_done_callback(_give_back)
            raise

    generate = _starting(Client.generate)
    prepare = _asynchronous(Client.prepare)
    lend = _asynchronous(Client.lend)
    lend_lora = _asynchronous(Client.lend_lora)
    lend_tokenizer = _asynchronous(Client.lend_tokenizer)
    return_ = _asynchronous(Client.return_)
    adopt = _asynchronous(Client.adopt)
    revoke = _asynchronous(Client.revoke)
    unload = _asynchronous(Client.unload)
    check_memory = _asynchronous(Client.check_memory)
    facts = _asynchronous(Client.facts)
    call = _asynchronous(Client.call)
    call_parts = _asynchronous(Client.call_parts)
    encode_text = _asynchronous(Client.encode_text)
    encode_prompt = _asynchronous(Client.encode_prompt)
    tokenize = _asynchronous(Client.tokenize)
    decode = _asynchronous(Client.decode)
    encode = _asynchronous(Client.encode)
    keep = _asynchronous(Client.keep)
    status = _asynchronous(Client.status)
    wait_ready = _asynchronous(Client.wait_ready)
    logs = _asynchronous(Client.logs)
    stop = _asynchronous(Client.stop)

    def _started(self) -> Client:
        if self._is_closed.is_set():
            raise Closed(_CLOSED)
        if self._client is None:
            raise Closed("this AsyncClient is not open: use it within `async with AsyncClient() as client`")
        return self._client

    def __repr__(self) -> str:
        return f"<AsyncClient, {self._client!r}>"


class AsyncGenerationJob(OfOneProcess):
    """A running generation. It runs even if its events are not read.

    ``async for`` gives a :class:`StepDone` after every step; ``await job.result()`` the result. Cancelling a task that
    waits for either, or leaving an ``async with`` block, cancels the job in the workers.
    """

    def __init__(self, client: AsyncClient, job: GenerationJob) -> None:
        self._client = client
        self._job = job
        self._lock = threading.Lock()
        """Held by the thread that waits for the next reply."""

    @property
    def request_id(self) -> str:
        return self._job.request_id

    @property
    def total_steps(self) -> int:
        return self._job.total_steps

    async def events(self) -> AsyncIterator[AnyEvent]:
        """Iterate over all events, as :meth:`GenerationJob.events` does."""
        events = self._job.events()
        while (event := await self._wait(lambda: next(events, None))) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[StepDone]:
        async for event in self.events():
            if isinstance(event, StepDone):
                yield event

    async def result(self) -> GenerationResult:
        """Wait for the end and return the result, as :meth:`GenerationJob.result` does."""
        return await self._wait(self._job.result)

    async def denoised(self) -> torch.Tensor:
        """Copy the clean latents that the last step predicted, as :meth:`GenerationJob.denoised` does."""
        return await self._wait(self._job.denoised)

    async def preview(self) -> torch.Tensor:
        """Copy the image of what the last step predicted, as :meth:`GenerationJob.preview` does.

        Await it in the loop that reads the events: while another task waits for the next event, it waits, too.
        """
        return await self._wait(self._job.preview)

    def cancel(self) -> None:
        """Stop the job at its next step or chunk of frames, without waiting; ``result()`` then raises ``Cancelled``."""
        self._job.cancel()

    async def __aenter__(self) -> AsyncGenerationJob:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._job.__exit__(kind, error, traceback)

    async def _wait(self, function: Callable[[], T]) -> T:
        def wait() -> T:
            with self._lock:
                return function()

        try:
            return await self._client.run(wait)
        except asyncio.CancelledError:
            self._job.cancel()
            raise

    def __repr__(self) -> str:
        return f"<AsyncGenerationJob {self.request_id}, {self.total_steps} steps>"


def _is_return(function: Callable[..., Any]) -> bool:
    """Return whether the function is ``return_`` of a client or a loan."""
    method = getattr(function, "__func__", function)
    return method is Client.return_ or method is Loan.return_


def _give_back(future: Future[Any]) -> None:
    """End what a function has returned after its caller was cancelled."""
    if future.cancelled() or future.exception() is not None:
        return
    found = future.result()
    if isinstance(found, Loan):
        found.return_soon()
    elif isinstance(found, GenerationJob):
        found.cancel()
    elif isinstance(found, Client):
        found.close()
