"""Requests that wait for the workers, or run on them: one bounded queue, first come, first served."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from xditd.daemon.sequence import Script
from xditd.daemon.sessions import Session
from xditd.daemon.states import JOB_NEXT, move
from xditd.ipc.errors import BadRequest, Busy, XditdError
from xditd.ipc.protocol import Reply, Request
from xditd.ipc.requests import Decode, Denoise, Encode, EncodeText, Generate
from xditd.ipc.status import JobState, JobStatus


@dataclass(eq=False)
class Job:
    """One request that needs the workers; ``write_script`` is called when its turn comes."""

    session: Session
    request: Request
    write_script: Callable[[Job], Script[Reply]]
    component_ids: tuple[str, ...] = ()
    state: JobState = JobState.QUEUED
    ending: XditdError | None = None
    """Why it was cancelled, from then on."""
    step: int = 0
    total_steps: int = 0
    queued_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None

    @property
    def op(self) -> str:
        return op_of(self.request)

    @property
    def is_image_work(self) -> bool:
        """Whether it is one of the five jobs, which the counters count; lends and canaries only share the queue."""
        return isinstance(self.request, (Generate, Denoise, Decode, Encode, EncodeText))

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


class JobQueue:
    """At most ``limit`` waiting jobs, and the one that runs."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running: Job | None = None
        self._waiting: deque[Job] = deque()

    def __iter__(self) -> Iterator[Job]:
        """The running job, then the waiting ones in order."""
        return iter([*([self.running] if self.running else []), *self._waiting])

    @property
    def waiting(self) -> tuple[Job, ...]:
        return tuple(self._waiting)

    def add(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            BadRequest: the session has a live request of this id.
            Busy: as many jobs as may wait do so already.
        """
        if self.find(job.session, job.request.request_id) is not None:
            raise BadRequest(f"request_id {job.request.request_id}: still in use; give every request its own")
        if len(self._waiting) >= self.limit:
            raise Busy(f"{len(self._waiting)} requests wait already (queue_limit {self.limit}); retry in a while")
        self._waiting.append(job)

    def take(self) -> Job | None:
        """Let the next job run; ``None`` when there is none."""
        if not self._waiting:
            return None
        self.running = job = self._waiting.popleft()
        job.move(JobState.RUNNING)
        job.started_s = time.monotonic()
        return job

    def remove(self, job: Job) -> None:
        """Drop a job that has ended."""
        if self.running is job:
            self.running = None
        else:
            self._waiting.remove(job)

    def find(self, session: Session, request_id: str) -> Job | None:
        for job in self:
            if job.session is session and job.request.request_id == request_id:
                return job
        return None


def op_of(request: Request) -> str:
    return str(request.__struct_config__.tag)
