"""What a job came to, apart from its results."""

from __future__ import annotations

from typing import NamedTuple


class Finished(NamedTuple):
    """Milliseconds by phase, and how many steps a cache spared, counted for each image."""

    timings_ms: dict[str, float]
    reused_steps: int
