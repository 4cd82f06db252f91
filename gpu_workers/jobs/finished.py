"""What a job came to, apart from what it wrote into the client's I/O block."""

from __future__ import annotations

from typing import NamedTuple

from xditd.ipc.worker_messages import CallResults


class Finished(NamedTuple):
    """Milliseconds by phase; how many steps a cache spared, counted for each image; what a call gave, on rank 0."""

    timings_ms: dict[str, float]
    reused_steps: int = 0
    results: CallResults | None = None
