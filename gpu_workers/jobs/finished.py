"""The result of a job, besides the tensors in the client's I/O block."""

from __future__ import annotations

from typing import NamedTuple

from xditd.ipc.job_parts import CutText
from xditd.ipc.worker_messages import CallResults


class Finished(NamedTuple):
    """Milliseconds by phase; steps that the step cache reused, counted for each image.

    On rank 0 also the results of a call, and the texts that were cut.
    """

    timings_ms: dict[str, float]
    reused_steps: int = 0
    results: CallResults | None = None
    cut: tuple[CutText, ...] = ()
