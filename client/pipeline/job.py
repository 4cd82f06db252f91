"""A running call of a pipeline: its events, its previews and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Final

from xditd.client.forks import OfOneProcess
from xditd.client.jobs.generation import GenerationJob
from xditd.client.pipeline.results import PipelineResult
from xditd.client.pipeline.settings import RunSettings
from xditd.ipc.errors import LeaseLost, SessionLost, UnknownComponent
from xditd.ipc.replies import AnyEvent, StepDone

if TYPE_CHECKING:
    from PIL import Image

LOST: Final = (LeaseLost, SessionLost, UnknownComponent)
"""A job or its start ends with one of them where a loan has ended."""

OnProgress = Callable[[AnyEvent], object]
Ended = Callable[[BaseException | None], None]
"""Is called when a job has ended, with the error that ended it."""
OnPreview = Callable[["Image.Image", int, int], object]


class PipelineJob(OfOneProcess):
    """A running call. It runs even if its events are not read.

    Iterate over it for a :class:`StepDone` after every step, then call ``result()``; leaving a ``with`` block, or any
    exception while waiting, cancels it. For one thread at a time, except ``cancel()``.
    """

    def __init__(self, job: GenerationJob, settings: RunSettings, ended: Ended) -> None:
        self._job = job
        self._ended: Ended | None = ended
        self._result: PipelineResult | None = None
        self.settings = settings
        self.has_begun = False
        """Whether a step was seen to be done."""

    @property
    def total_steps(self) -> int:
        return self._job.total_steps

    @property
    def request_id(self) -> str:
        return self._job.request_id

    def __iter__(self) -> Iterator[StepDone]:
        for event in self.events():
            if isinstance(event, StepDone):
                yield event

    def events(self) -> Iterator[AnyEvent]:
        """Iterate over all events, as :meth:`GenerationJob.events` does."""
        try:
            for event in self._job.events():
                self.has_begun = self.has_begun or isinstance(event, StepDone)
                yield event
        except LOST as error:
            self._end(error)
            raise

    def preview(self) -> Image.Image:
        """Return the first picture as the last step predicts it, of a job that was started with previews.

        Raises:
            BadRequest: as :meth:`GenerationJob.preview`.
        """
        from xditd.client.image_files import image_to_pil

        return image_to_pil(self._job.preview()[0])

    def result(self) -> PipelineResult:
        """Wait for the end and return the result; further calls return the same object.

        Raises:
            Cancelled: by ``cancel()``, or by leaving the ``with`` block.
            XditdError: the error that ended the job.
        """
        if self._result is None:
            try:
                found = self._job.result()
            except BaseException as error:
                self._end(error)
                raise
            self._end()
            self._result = PipelineResult(found, self.settings)
        return self._result

    def watch(self, on_progress: OnProgress | None, on_preview: OnPreview | None) -> PipelineResult:
        """Wait for the end and return the result; call functions with each event, and with the picture of each step.

        Raises:
            XditdError: as :meth:`result`; and what a function raises.
        """
        for event in self.events():
            if on_preview is not None and isinstance(event, StepDone):
                on_preview(self.preview(), event.step, event.total_steps)
            if on_progress is not None:
                on_progress(event)
        return self.result()

    def cancel(self) -> None:
        """Stop the job at its next step, without waiting. For any thread."""
        self._job.cancel()

    def _end(self, error: BaseException | None = None) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(error)

    def __enter__(self) -> PipelineJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._job.__exit__(kind, error, traceback)
        self._end()

    def __del__(self) -> None:
        self._end()

    def __repr__(self) -> str:
        return f"<PipelineJob of {self.settings.model}, {self._job!r}>"
