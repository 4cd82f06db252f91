"""Jobs: client requests that run on the workers, and their states."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Final

from xditd.daemon.operations.states import move
from xditd.daemon.queue.commands import Script
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import XditdError
from xditd.ipc.protocol import Reply, Request
from xditd.ipc.status import JobState, JobStatus

JOB_NEXT: Final[Mapping[JobState, Set[JobState]]] = {
    JobState.QUEUED: {JobState.RUNNING, JobState.FAILED},
    JobState.RUNNING: {JobState.DONE, JobState.CANCELLING, JobState.FAILED},
    JobState.CANCELLING: {JobState.FAILED},
    JobState.DONE: set(),
    JobState.FAILED: set(),
}
"""A cancelled job never ends as DONE, even if the workers finished it first."""


@dataclass(eq=False)
class Job:
    """One request in the queue or on the workers; ``write_script`` is called when it starts to run."""

    session: Session
    request: Request
    write_script: Callable[[Job], Script[Reply]]
    component_ids: tuple[str, ...] = ()
    state: JobState = JobState.QUEUED
    cancel_error: XditdError | None = None
    """Why it was cancelled; ``None`` before that."""
    step: int = 0
    total_steps: int = 0
    queued_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None

    @property
    def op(self) -> str:
        return op_of(self.request)

    @property
    def waited_s(self) -> float:
        return (time.monotonic() if self.started_s is None else self.started_s) - self.queued_s

    @property
    def ran_s(self) -> float:
        return 0.0 if self.started_s is None else time.monotonic() - self.started_s

    def move(self, to: JobState) -> None:
        self.state = move(JOB_NEXT, self.state, to)

    def status(self) -> JobStatus:
        return JobStatus(
            request_id=self.request.request_id,
            op=self.op,
            state=self.state,
            owner_pid=self.session.process.pid,
            step=self.step,
            total_steps=self.total_steps,
            waited_s=self.waited_s,
            ran_s=self.ran_s,
        )


def op_of(request: Request | type[Request]) -> str:
    """Return a request's name in logs, counters and metrics."""
    return str(request.__struct_config__.tag)
