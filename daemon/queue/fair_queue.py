"""Fair queue: a bounded queue of jobs that serves clients in turn (round robin)."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Final

from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import Busy
from xditd.ipc.processes import ProcessIdentity

FIRST_GUESS_S: Final = 1.0
"""Assumed duration of a job before any has been measured."""

LEARNING: Final = 0.2
"""Weight of the latest job in the moving average of durations."""

MIN_RETRY_S: Final = 0.05
MAX_RETRY_S: Final = 60.0


class FairQueue:
    """A queue of at most ``limit`` jobs, and ``client_limit`` of one process.

    Processes take turns, the sessions of a process take turns, and within a session the older job goes first. So a
    program with many connections has one turn, like the others.
    """

    def __init__(self, limit: int, client_limit: int) -> None:
        self.limit = limit
        self.client_limit = client_limit
        self._typical_s = FIRST_GUESS_S
        self._processes: OrderedDict[ProcessIdentity, OrderedDict[Session, deque[Job]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        """Yield every job, in the order in which they will run if no other is added."""
        # A copy, which the loop empties.
        processes = deque(deque(map(deque, sessions.values())) for sessions in self._processes.values())
        while processes:
            sessions = processes.popleft()
            jobs = sessions.popleft()
            yield jobs.popleft()
            if jobs:
                sessions.append(jobs)
            if sessions:
                processes.append(sessions)

    def of_process(self, process: ProcessIdentity) -> list[Job]:
        """Return one client's jobs, session by session."""
        return [job for jobs in self._processes.get(process, {}).values() for job in jobs]

    def note_duration(self, ran_s: float) -> None:
        """Update the moving average of job durations."""
        self._typical_s += LEARNING * (ran_s - self._typical_s)

    def add(self, job: Job) -> None:
        """Add a job.

        Raises:
            Busy: the queue, or this client's share of it, is full; ``retry_after_s`` says when to try again.
        """
        if self._count >= self.limit:
            # A place is free when the next job ends.
            raise _busy(f"{self._count} requests wait already (queue_limit {self.limit})", self._typical_s)
        own = len(self.of_process(job.session.process))
        if own >= self.client_limit:
            # A place is free after this client's next turn, one round of all clients away.
            raise _busy(
                f"{own} requests of this client wait already (client_queue_limit {self.client_limit})",
                self._typical_s * len(self._processes),
            )
        sessions = self._processes.setdefault(job.session.process, OrderedDict())
        sessions.setdefault(job.session, deque()).append(job)
        self._count += 1

    def take(self) -> Job | None:
        """Remove and return the next job; its process and its session go to the end of their queues."""
        if not self._processes:
            return None
        process, sessions = self._processes.popitem(last=False)
        session, jobs = sessions.popitem(last=False)
        job = jobs.popleft()
        self._count -= 1
        if jobs:
            sessions[session] = jobs
        if sessions:
            self._processes[process] = sessions
        return job

    def remove(self, job: Job) -> None:
        """Remove a queued job; its client keeps its turn for the others."""
        sessions = self._processes[job.session.process]
        jobs = sessions[job.session]
        jobs.remove(job)
        self._count -= 1
        if not jobs:
            del sessions[job.session]
        if not sessions:
            del self._processes[job.session.process]


def _busy(why: str, retry_after_s: float) -> Busy:
    retry_after_s = max(MIN_RETRY_S, min(MAX_RETRY_S, retry_after_s))
    error = Busy(f"{why}; retry in {retry_after_s:.2f} s")
    error.retry_after_s = retry_after_s
    return error
