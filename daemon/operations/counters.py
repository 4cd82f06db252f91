"""Event counters and histograms of the daemon, for metrics and for ``xditd status``.

Every table is bounded: its keys are names of this project (operations, error codes, kinds), never clients' values.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections import Counter, deque
from collections.abc import Sequence, Set
from typing import Final

from xditd.ipc import limits
from xditd.ipc.errors import Cancelled, XditdError
from xditd.ipc.status import ErrorStatus
from xditd.ipc.tensors import CopiedBytes
from xditd.ipc.worker_messages import StepReached

JOB_BOUNDS_S: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
STEP_BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
COPY_KINDS: Final = CopiedBytes.__struct_fields__
MAX_DETAIL_CHARS: Final = 500


class Histogram:
    """Counts by upper bound, the last of which is infinite, and the sum of all values."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return Prometheus buckets: upper bounds as text, each with the count of values up to it."""
        bounds = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))


class EventCounters:
    """Counters of events since the daemon started."""

    def __init__(self) -> None:
        self.jobs: Counter[tuple[str, str]] = Counter()
        """By operation and outcome: done, failed or cancelled."""
        self.waited: dict[str, Histogram] = {}
        self.ran: dict[str, Histogram] = {}
        self.steps = Histogram(STEP_BOUNDS_S)
        self.errors: Counter[str] = Counter()
        self.lent_bytes: Counter[str] = Counter()
        """By tier. A repeated lend of the same bytes is not counted."""
        self.copied_bytes: Counter[str] = Counter()
        self._last_errors: deque[tuple[float, str, str, str]] = deque(maxlen=limits.MAX_LAST_ERRORS)
        self._last_step_s = 0.0

    def job_ended(self, op: str, error: XditdError | None, waited_s: float, ran_s: float) -> None:
        """Count a job."""
        outcome = "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
        self.jobs[op, outcome] += 1
        self.waited.setdefault(op, Histogram(JOB_BOUNDS_S)).add(waited_s)
        if error is None:
            # Only complete jobs: failed ones end early and would make a slow machine look fast.
            self.ran.setdefault(op, Histogram(JOB_BOUNDS_S)).add(ran_s)
        elif outcome == "failed":
            self.note_error(op, error)

    def outcomes(self, ops: Set[str]) -> dict[str, int]:
        """Count the jobs of these operations that were done, failed or cancelled."""
        found = {"done": 0, "failed": 0, "cancelled": 0}
        for (op, outcome), count in self.jobs.items():
            if op in ops:
                found[outcome] += count
        return found

    def step_reached(self, step: StepReached) -> None:
        """Count one step: the time since the previous report, each of which counts from the start of the first step."""
        before_s = 0.0 if step.step <= 1 else self._last_step_s
        self._last_step_s = step.elapsed_s
        self.steps.add(max(0.0, step.elapsed_s - before_s))

    def lent(self, lent_bytes: dict[str, int], copied: CopiedBytes) -> None:
        """Count the bytes that a lend shared, by tier, and those that client and workers copied, by kind."""
        self.lent_bytes.update(lent_bytes)
        self.copied_bytes.update({kind: getattr(copied, kind) for kind in COPY_KINDS})

    def note_error(self, where: str, error: XditdError) -> None:
        """Count an error and keep it as the last one. ``where`` is an operation, or ``workers``."""
        self.errors[error.code] += 1
        self._last_errors.append((time.monotonic(), where, error.code, error.detail[:MAX_DETAIL_CHARS]))

    def last_errors(self) -> tuple[ErrorStatus, ...]:
        """The last errors, newest first."""
        now_s = time.monotonic()
        return tuple(
            ErrorStatus(age_s=now_s - noted_s, where=where, code=code, detail=detail)
            for noted_s, where, code, detail in reversed(self._last_errors)
        )
