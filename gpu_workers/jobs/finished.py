"""The result of a job, besides the tensors in the client's I/O block."""

from __future__ import annotations

from typing import NamedTuple

from xditd.ipc.worker_messages import CallResults


class Finished(NamedTuple):
    """Milliseconds by phase; steps that the step cache reused, counted for each image; results of a call, on rank 0."""

    timings_ms: dict[str, float]
    reused_steps: int = 0
    results: CallResults | None = None
