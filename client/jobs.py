"""Jobs under way: events, the result, cancellation, and the block that carries their tensors."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from xditd.client.connection import Connection
from xditd.client.io_blocks import IoBlock, IoPool
from xditd.client.mailboxes import Ending, Patience, expect
from xditd.client.results import GenerationResult
from xditd.ipc.errors import BY_CODE, BadRequest, Cancelled, RequestError, XditdError
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import AnyEvent, AnyReply, Failed, Generated, Queued, StepDone
from xditd.ipc.requests import Cancel, Job

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Reply)

_MAX_SEED = 2**63 - 1


def draw_seed() -> int:
    """Draw a seed for a job that names none. It is handed back with the result, so that it can be repeated."""
    return int.from_bytes(os.urandom(8), "little") & _MAX_SEED


class PendingJob:
    """One job that the daemon has been sent. Close it whatever happens: that cancels what still runs.

    The block goes back to the pool when the daemon says that the job has ended, and not before: until
    then workers may write to it.
    """

    def __init__(
        self, connection: Connection, pool: IoPool, request: Job, block: IoBlock, patience: Patience, purpose: str
    ) -> None:
        self._connection = connection
        self._pool = pool
        self._block = block
        self._patience = patience
        self._is_closed = False
        self._is_cancelled = False
        self._lock = threading.Lock()
        self._request_id = request.request_id
        try:
            self._mailbox = connection.submit(request, purpose)
        except BaseException:
            pool.give_back(block)
            raise

    @property
    def request_id(self) -> str:
        return self._request_id

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def take(self) -> AnyReply:
        """Wait for the next event or the reply."""
        return self._mailbox.take(self._patience)

    def wait(self, reply_type: type[R]) -> R:
        """Wait for the reply, dropping events."""
        return self._mailbox.wait(reply_type, self._patience)

    def cancel(self) -> None:
        """Ask the daemon to stop the job at its next step. Does not wait; too late is no error."""
        with self._lock:
            if self._is_cancelled or self._mailbox.is_ended:
                return
            self._is_cancelled = True
        try:
            self._connection.submit(
                Cancel(request_id=self._connection.next_request_id(), target_request_id=self._request_id)
            )
        except XditdError as error:
            # The connection is gone, and with it the session and its jobs.
            logger.debug("cancel not sent request_id=%s reason=%s", self._request_id, error)

    def close(self) -> None:
        """Cancel the job unless it has ended, and let go of its block. May be called twice."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self.cancel()
        pool, block = self._pool, self._block
        self._mailbox.when_ended(lambda ending: (pool.give_back if _left_alone(ending) else pool.drop)(block))

    def close_soon(self) -> None:
        """Close it on the connection's thread: for finalizers, which must wait for no lock."""
        self._connection.run_soon(self.close)

    def __enter__(self) -> PendingJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _left_alone(ending: Ending) -> bool:
    """Whether every worker has surely stopped writing.

    Only a result or a refusal of the request tells: a job that was cancelled, or whose loan was lost, may have ended
    with its group, whose ranks are being killed just now.
    """
    if isinstance(ending, Failed):
        return issubclass(BY_CODE.get(ending.code, XditdError), RequestError)
    return not isinstance(ending, XditdError)


class GenerationJob:
    """A generation under way. It runs whether or not anybody watches.

    Iterate over it for a :class:`StepDone` after every step, then take ``result()``; or take
    ``result()`` at once. Leaving the loop early, leaving a ``with`` block, or any exception while waiting
    (``KeyboardInterrupt`` too) cancels the job in the workers. For one thread at a time, except ``cancel()``.
    """

    def __init__(
        self,
        pending: PendingJob,
        read_outputs: Callable[[Generated], GenerationResult],
        read_denoised: Callable[[], torch.Tensor],
        total_steps: int,
        owner: object = None,
    ) -> None:
        """``owner`` is kept alive until the job has ended."""
        self.total_steps = total_steps
        self._owner = owner
        self._pending = pending
        self._read_outputs = read_outputs
        self._read_denoised = read_denoised
        self._started_s = time.perf_counter()
        self._reply: AnyReply | None = None
        self._result: GenerationResult | None = None
        # A job that nobody holds any more must not go on in the workers.
        self._finalizer = weakref.finalize(self, pending.close_soon)
        self._finalizer.atexit = False  # the daemon sees the process end

    @property
    def request_id(self) -> str:
        return self._pending.request_id

    def __iter__(self) -> Iterator[StepDone]:
        for event in self.events():
            if isinstance(event, StepDone):
                yield event

    def events(self) -> Iterator[AnyEvent]:
        """Iterate over all events: ``Queued`` while others go first or workers start, then ``StepDone``."""
        if self._reply is not None:
            return
        try:
            while True:
                item = self._next()
                if isinstance(item, (Queued, StepDone)):
                    yield item
                else:
                    self._settle(item)
                    return
        finally:
            if self._reply is None:
                self._pending.close()

    def result(self) -> GenerationResult:
        """Wait for the end and hand back what was made; again and again the same.

        Raises:
            Cancelled: by ``cancel()``, or by leaving the loop or the ``with`` block.
            XditdError: what went wrong, by its class.
        """
        if self._result is None:
            for _ in self.events():
                pass
            if self._reply is not None:
                self._settle(self._reply)
        if self._result is None:
            raise Cancelled(f"generation {self.request_id}: cancelled by its caller")
        return self._result

    def denoised(self) -> torch.Tensor:
        """Copy what the last step takes the clean latents for: call it between two events, for a preview.

        (batch, 16, height/8, width/8), on the device and in the dtype of the latents. The workers may be writing
        the next step's meanwhile, so that parts of both are seen.

        Raises:
            BadRequest: the job was started without ``previews``, or has ended.
        """
        if self._pending.is_closed:
            raise BadRequest(f"generation {self.request_id} has ended: its result has the latents")
        return self._read_denoised()

    def cancel(self) -> None:
        """Stop the job at its next step, without waiting; ``result()`` then raises ``Cancelled``. For any thread."""
        self._pending.cancel()

    def __enter__(self) -> GenerationJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pending.close()

    def _next(self) -> AnyReply:
        if self._pending.is_closed:
            raise Cancelled(f"generation {self.request_id}: cancelled by its caller")
        return self._pending.take()

    def _settle(self, reply: AnyReply) -> None:
        self._reply = reply
        try:
            generated = expect(reply, Generated, f"generation {self.request_id}")
            if self._result is None:
                result = self._read_outputs(generated)
                result.timings_ms["round_trip"] = (time.perf_counter() - self._started_s) * 1e3
                self._result = result
        finally:
            self._owner = None
            self._pending.close()

    def __repr__(self) -> str:
        state = "done" if self._result is not None else "ended" if self._pending.is_closed else "under way"
        return f"<GenerationJob {self.request_id}, {self.total_steps} steps, {state}>"
