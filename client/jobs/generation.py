"""``GenerationJob``: a running generation with its events, previews and result."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from xditd.client.forks import OfOneProcess
from xditd.client.jobs.pending import PendingJob
from xditd.client.mailboxes import expect
from xditd.client.results import GenerationResult
from xditd.ipc.errors import BadRequest, Cancelled
from xditd.ipc.replies import AnyEvent, AnyReply, Generated, StepDone

if TYPE_CHECKING:
    import torch

_MAX_SEED = 2**63 - 1


def draw_seed() -> int:
    """Draw a seed for a job without one. The result contains it, so that the job can be repeated."""
    return int.from_bytes(os.urandom(8), "little") & _MAX_SEED


class GenerationJob(OfOneProcess):
    """A running generation. It runs even if its events are not read.

    Iterate over it for a :class:`StepDone` after every step, then call ``result()``; or call
    ``result()`` at once. Leaving the loop early, leaving a ``with`` block, or any exception while waiting
    (``KeyboardInterrupt`` too) cancels the job in the workers. Events are for one thread; ``cancel()`` and
    ``result()`` for any.
    """

    def __init__(
        self,
        pending: PendingJob,
        read_outputs: Callable[[Generated], GenerationResult],
        read_denoised: Callable[[], torch.Tensor],
        read_preview: Callable[[], torch.Tensor],
        total_steps: int,
        owner: object = None,
    ) -> None:
        """``owner`` is kept alive until the job has ended."""
        self.total_steps = total_steps
        self._owner = owner
        self._pending = pending
        self._read_outputs = read_outputs
        self._read_denoised = read_denoised
        self._read_preview = read_preview
        self._started_s = time.perf_counter()
        self._has_stepped = False
        """Whether a step was seen to be done: before that, the block has what an earlier job predicted."""
        self._reply: AnyReply | None = None
        self._result: GenerationResult | None = None
        self._lock = threading.Lock()
        """Held while the outputs are read: another thread may wait for the result, too."""
        # A job without references is cancelled in the workers.
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
        """Iterate over all events: ``Queued`` while other jobs run or workers start, then ``StepDone``.

        With a VAE, ``FramesDecoded`` after each chunk of a video follow the steps.
        """
        if self._reply is not None:
            return
        try:
            while True:
                item = self._next()
                if isinstance(item, AnyEvent):
                    self._has_stepped = self._has_stepped or isinstance(item, StepDone)
                    yield item
                else:
                    self._set_reply(item)
                    return
        finally:
            if self._reply is None:
                self._pending.close()

    def result(self) -> GenerationResult:
        """Wait for the end and return the result; further calls return the same object.

        Raises:
            Cancelled: by ``cancel()``, or by leaving the loop or the ``with`` block.
            XditdError: the error that ended the job.
        """
        if self._result is None:
            for _ in self.events():
                pass
            if self._reply is not None:
                self._set_reply(self._reply)
        if self._result is None:
            raise Cancelled(f"generation {self.request_id}: cancelled by its caller")
        return self._result

    def denoised(self) -> torch.Tensor:
        """Copy the clean latents that the last step predicted: call it between two events, after a ``StepDone``.

        They have shape, device and dtype of the latents. The workers may write those of the next step at the same
        time, so the copy may contain parts of both.

        Raises:
            BadRequest: the job was started without ``previews``, has ended, or no step was seen to be done.
        """
        if self._pending.is_closed:
            raise BadRequest(f"generation {self.request_id} has ended: its result has the latents")
        return self._predicted(self._read_denoised)

    def preview(self) -> torch.Tensor:
        """Copy the image of what the last step predicted: call it between two events, after the first ``StepDone``.

        (batch, 3, height, width), float32 in [-1, 1], on the device of the latents; of a video it is the middle frame,
        decoded as an image of its own. It may contain parts of the next step, as :meth:`denoised`.

        Raises:
            BadRequest: the job was started without ``previews="image"``, has ended, or no step was seen to be done.
        """
        if self._pending.is_closed:
            raise BadRequest(f"generation {self.request_id} has ended: its result has the image")
        return self._predicted(self._read_preview)

    def _predicted(self, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        has_stepped = self._has_stepped  # before the copy, which has to be of a step
        found = read()  # also refuses a job without previews
        if not has_stepped:
            raise BadRequest(
                f"generation {self.request_id}: no step of it was seen to be done: iterate over the job, and call this "
                "after its first StepDone"
            )
        return found

    def cancel(self) -> None:
        """Stop the job at its next step or chunk of frames, without waiting; ``result()`` then raises ``Cancelled``.

        For any thread.
        """
        self._pending.cancel()

    def __enter__(self) -> GenerationJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._pending.close()

    def _next(self) -> AnyReply:
        if self._pending.is_closed and self._reply is None:
            raise Cancelled(f"generation {self.request_id}: cancelled by its caller")
        return self._pending.take()

    def _set_reply(self, reply: AnyReply) -> None:
        with self._lock:
            self._reply = reply
            try:
                generated = expect(reply, Generated, f"generation {self.request_id}")
                if self._result is None and not self._pending.is_closed:
                    result = self._read_outputs(generated)
                    result.timings_ms["round_trip"] = (time.perf_counter() - self._started_s) * 1e3
                    self._result = result
            finally:
                self._owner = None
                self._pending.close()

    def __repr__(self) -> str:
        state = "done" if self._result is not None else "ended" if self._pending.is_closed else "under way"
        return f"<GenerationJob {self.request_id}, {self.total_steps} steps, {state}>"
