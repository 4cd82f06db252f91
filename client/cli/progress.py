"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from xditd.client.jobs.generation import GenerationJob
from xditd.client.results import GenerationResult
from xditd.ipc.replies import Queued


class _Stderr:
    """Where bars are drawn: a terminal that is gone, or a full disk behind it, must not end the job."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def bar(total: int, text: str, is_quiet: bool = False, is_even: bool = True) -> Any:
    """Make a progress bar over ``total`` steps. Quiet bars count, and draw nothing.

    Steps that are not even take differently long each: the bar then shows the time spent, and promises none.
    """
    from tqdm import tqdm

    shape = None if is_even else "{desc}: |{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
    return tqdm(total=total, desc=text, file=_Stderr(), disable=is_quiet, dynamic_ncols=True, bar_format=shape)


def watch(job: GenerationJob, text: str, is_quiet: bool = False) -> GenerationResult:
    """Show a generation's steps until its end; what it waits for before that. Any error here cancels the job."""
    with job, bar(job.total_steps, text, is_quiet) as steps:
        for event in job.events():
            if isinstance(event, Queued):
                behind = f", {event.ahead} ahead" if event.ahead else ""
                steps.set_description_str(f"{text}: waiting{behind} ({event.reason})")
            else:
                steps.set_description_str(text, refresh=False)
                steps.update(event.step - steps.n)
        return job.result()
