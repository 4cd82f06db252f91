"""Requests that wait for the workers, or run on them: one bounded queue, in which clients take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from xditd.daemon.operations.states import JOB_NEXT, move
from xditd.daemon.queue.commands import Script
from xditd.daemon.queue.fair_queue import Turns
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import BadRequest, Busy, XditdError
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.protocol import Reply, Request
from xditd.ipc.requests import Job as JobRequest
from xditd.ipc.status import JobState, JobStatus

FIRST_GUESS_S: Final = 1.0
"""How long a request is taken to keep the workers before any has been seen."""

LEARNING: Final = 0.2
"""Weight of the latest request in what is held to be typical."""

MIN_RETRY_S: Final = 0.05
MAX_RETRY_S: Final = 60.0


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
        """Whether it runs on lent components: the counters count these; lends and canaries only share the queue."""
        return isinstance(self.request, JobRequest)

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
    """The job that runs, and those that wait: at most ``limit`` in all and ``client_limit`` of one process."""

    def __init__(self, limit: int, client_limit: int) -> None:
        self.limit = limit
        self.client_limit = client_limit
        self.running: Job | None = None
        self.typical_s = FIRST_GUESS_S
        """How long a request keeps the workers, by the latest ones."""
        self._turns: Turns[Job] = Turns()

    def __iter__(self) -> Iterator[Job]:
        """The running job, then the waiting ones in the order of their turns."""
        return iter([*([self.running] if self.running else []), *self._turns])

    def __len__(self) -> int:
        return len(self._turns) + (self.running is not None)

    @property
    def waiting(self) -> tuple[Job, ...]:
        return tuple(self._turns)

    @property
    def is_anybody_waiting(self) -> bool:
        return len(self._turns) > 0

    def of_process(self, process: ProcessIdentity) -> list[Job]:
        """One client's jobs, over all its connections."""
        found = list(self._turns.of_process(process))
        if self.running is not None and self.running.session.process == process:
            found.append(self.running)
        return found

    def add(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            BadRequest: the session has a live request of this id.
            Busy: as many jobs as may wait do so already, of all clients or of this one. Says when to come back.
        """
        if self.find(job.session, job.request.request_id) is not None:
            raise BadRequest(f"request_id {job.request.request_id}: still in use; give every request its own")
        waiting = len(self._turns)
        if waiting >= self.limit:
            # A place is free again with the next job that ends.
            raise self._busy(f"{waiting} requests wait already (queue_limit {self.limit})", self.typical_s)
        own = sum(1 for _ in self._turns.of_process(job.session.process))
        if own >= self.client_limit:
            # With each of this client's turns, which come once in a round.
            raise self._busy(
                f"{own} requests of this client wait already (client_queue_limit {self.client_limit})",
                self.typical_s * self._turns.clients,
            )
        self._turns.add(job)

    def take(self) -> Job | None:
        """Let the next job run; ``None`` when there is none."""
        job = self._turns.take()
        if job is not None:
            self.running = job
            job.move(JobState.RUNNING)
            job.started_s = time.monotonic()
        return job

    def remove(self, job: Job) -> None:
        """Drop a job that has ended."""
        if self.running is job:
            self.running = None
            self.typical_s += LEARNING * (job.ran_s - self.typical_s)
        else:
            self._turns.remove(job)

    def find(self, session: Session, request_id: str) -> Job | None:
        for job in self.of_process(session.process):
            if job.session is session and job.request.request_id == request_id:
                return job
        return None

    @staticmethod
    def _busy(why: str, retry_after_s: float) -> Busy:
        error = Busy(f"{why}; retry in {max(MIN_RETRY_S, min(MAX_RETRY_S, retry_after_s)):.2f} s")
        error.retry_after_s = max(MIN_RETRY_S, min(MAX_RETRY_S, retry_after_s))
        return error


def op_of(request: Request) -> str:
    return str(request.__struct_config__.tag)
