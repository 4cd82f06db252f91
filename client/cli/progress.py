"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, TypeVar

from xditd.ipc.replies import AnyEvent, FramesDecoded, Queued


class _Stderr:
    """Standard error for bars: a closed terminal or a full disk must not end the job."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def bar(total: int, text: str, is_quiet: bool = False, shows_eta: bool = True) -> Any:
    """Make a progress bar over ``total`` steps; a quiet bar counts but draws nothing.

    Without ``shows_eta``, for steps of different lengths, the bar shows no estimate of the remaining time.
    """
    from tqdm import tqdm

    bar_format = None if shows_eta else "{desc}: |{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
    return tqdm(total=total, desc=text, file=_Stderr(), disable=is_quiet, dynamic_ncols=True, bar_format=bar_format)


R_co = TypeVar("R_co", covariant=True)


class _Job(Protocol[R_co]):
    """A generation, or a call of a pipeline."""

    @property
    def total_steps(self) -> int: ...
    def events(self) -> Iterator[AnyEvent]: ...
    def result(self) -> R_co: ...
    def __enter__(self) -> object: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...


def watch(job: _Job[R_co], text: str, is_quiet: bool = False) -> R_co:
    """Show why a generation waits, its steps and the frames of a video, until its end. An error cancels the job.

    The bar of steps ends before that of frames begins: of two bars, tqdm moves the cursor up and down, also in files.
    """
    with job, ExitStack() as bars:
        steps = bars.enter_context(bar(job.total_steps, text, is_quiet))
        frames: Any = None
        for event in job.events():
            if isinstance(event, Queued):
                behind = f", {event.ahead} ahead" if event.ahead else ""
                steps.set_description_str(f"{text}: waiting{behind} ({event.reason})")
            elif isinstance(event, FramesDecoded):
                if frames is None:
                    steps.close()
                    frames = bars.enter_context(bar(event.total_frames, "decoding", is_quiet))
                frames.update(event.frames - frames.n)
            else:
                steps.set_description_str(text, refresh=False)
                steps.update(event.step - steps.n)
        return job.result()
