"""Jobs that wait: a bounded queue, in which clients take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Final

from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import Busy
from xditd.ipc.processes import ProcessIdentity

FIRST_GUESS_S: Final = 1.0
"""How long a job is taken to keep the workers before any has been seen."""

LEARNING: Final = 0.2
"""Weight of the latest job in what is held to be typical."""

MIN_RETRY_S: Final = 0.05
MAX_RETRY_S: Final = 60.0


class FairQueue:
    """At most ``limit`` jobs in all, and ``client_limit`` of one process.

    Processes take turns, the sessions of one process take turns, and within one session the older job goes first. By
    process first: a program that opens many connections has one turn, like the others.
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
        """Every job, in the order in which they will go if nothing else comes."""
        # A copy, to be used up.
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
        """One client's jobs, session by session."""
        return [job for jobs in self._processes.get(process, {}).values() for job in jobs]

    def note_duration(self, ran_s: float) -> None:
        """Learn how long a job keeps the workers."""
        self._typical_s += LEARNING * (ran_s - self._typical_s)

    def add(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            Busy: as many jobs as may wait do so already, of all clients or of this one. Says when to come back.
        """
        if self._count >= self.limit:
            # A place is free again with the next job that ends.
            raise _busy(f"{self._count} requests wait already (queue_limit {self.limit})", self._typical_s)
        own = len(self.of_process(job.session.process))
        if own >= self.client_limit:
            # With each of this client's turns, which come once in a round.
            raise _busy(
                f"{own} requests of this client wait already (client_queue_limit {self.client_limit})",
                self._typical_s * len(self._processes),
            )
        sessions = self._processes.setdefault(job.session.process, OrderedDict())
        sessions.setdefault(job.session, deque()).append(job)
        self._count += 1

    def take(self) -> Job | None:
        """Remove and return what goes next; its process and its session go to the back of their rows."""
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
        """Remove one that waits; its client keeps its place for the others."""
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
