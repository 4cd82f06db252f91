"""The jobs that a function starts while it runs in another thread, so that its caller can cancel them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Final, Protocol, TypeVar

T = TypeVar("T")


class Cancellable(Protocol):
    """A job that was sent."""

    def cancel(self) -> None:
        """Ask the daemon to stop it, without waiting. For any thread."""


class JobScope:
    """The jobs of one function call, from when they are sent until they are closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: list[Cancellable] = []
        self._is_cancelled = False

    def add(self, job: Cancellable) -> None:
        """Note a job that was sent. In a scope that is cancelled it is cancelled at once."""
        with self._lock:
            self._jobs.append(job)
            is_cancelled = self._is_cancelled
        if is_cancelled:
            job.cancel()

    def discard(self, job: Cancellable) -> None:
        """Forget a job."""
        with self._lock:
            self._jobs = [each for each in self._jobs if each is not job]

    def cancel(self) -> None:
        """Cancel all jobs, and those that are sent later. For any thread."""
        with self._lock:
            self._is_cancelled = True
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()


_current: Final[ContextVar[JobScope | None]] = ContextVar("job_scope", default=None)


def current_scope() -> JobScope | None:
    """Return the scope of the function that runs, if it has one."""
    return _current.get()


def run_in(scope: JobScope, function: Callable[[], T]) -> T:
    """Run a function whose jobs belong to this scope."""
    token: Token[JobScope | None] = _current.set(scope)
    try:
        return function()
    finally:
        _current.reset(token)
