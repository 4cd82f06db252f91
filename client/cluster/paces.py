"""What jobs and lends take on a host, measured."""

from __future__ import annotations

import threading
from typing import Final

_WEIGHT: Final = 0.3
"""Of the newest measurement in a mean: about the last five count."""


class Paces:
    """Means of measured times, in which newer ones count more. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pace: dict[str, float] = {}
        self._mean_job_s = 0.0
        self._lend_bytes_per_s = 0.0

    def count_job(self, transformer: str, work: float, ran_s: float) -> None:
        """Count a finished job by the time that the workers took, without its wait in the queue."""
        with self._lock:
            self._pace[transformer] = _mean(self._pace.get(transformer, 0.0), ran_s / max(work, 1e-9))
            self._mean_job_s = _mean(self._mean_job_s, ran_s)

    def count_lend(self, size_bytes: int, took_s: float) -> None:
        """Count a lend with its copy."""
        with self._lock:
            self._lend_bytes_per_s = _mean(self._lend_bytes_per_s, size_bytes / max(took_s, 1e-9))

    def snapshot(self) -> tuple[dict[str, float], float, float]:
        """Return the pace by transformer, the mean time of a job, and the bytes lent per second."""
        with self._lock:
            return dict(self._pace), self._mean_job_s, self._lend_bytes_per_s


def _mean(before: float, newest: float) -> float:
    return newest if before == 0.0 else (1 - _WEIGHT) * before + _WEIGHT * newest
