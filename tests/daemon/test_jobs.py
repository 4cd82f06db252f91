from __future__ import annotations

import pytest

from xditd.daemon.jobs import Job, JobQueue
from xditd.daemon.sessions import Session
from xditd.ipc.errors import BadRequest, Busy, Internal
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import GetStatus
from xditd.ipc.status import JobState


def session(name: bytes = b"a") -> Session:
    return Session(name, "", ProcessIdentity(pid=1, start_ticks=0), -1, "test")


OWNER = session()


def job(request_id: str, owner: Session = OWNER) -> Job:
    def no_script(_: Job) -> None:
        raise AssertionError("not to be run")

    return Job(owner, GetStatus(request_id=request_id), no_script)  # type: ignore[arg-type]


def test_first_come_first_served() -> None:
    queue = JobQueue(10)
    jobs = [job(str(number)) for number in range(3)]
    for each in jobs:
        queue.add(each)
    assert queue.take() is jobs[0]
    assert jobs[0].state is JobState.RUNNING
    assert list(queue) == jobs
    queue.remove(jobs[0])
    assert queue.running is None
    queue.remove(jobs[2])
    assert queue.take() is jobs[1]
    queue.remove(jobs[1])
    assert queue.take() is None


def test_bound_counts_those_who_wait() -> None:
    queue = JobQueue(2)
    for number in range(2):
        queue.add(job(str(number)))
    with pytest.raises(Busy, match=r"2 requests wait already \(queue_limit 2\); retry"):
        queue.add(job("2"))
    queue.take()
    queue.add(job("2"))


def test_request_ids_are_a_sessions_own() -> None:
    queue = JobQueue(10)
    other = session(b"b")
    queue.add(job("1"))
    queue.add(job("1", other))
    with pytest.raises(BadRequest, match="request_id 1: still in use"):
        queue.add(job("1"))
    found = queue.find(other, "1")
    assert found is not None
    assert found.session is other
    assert queue.find(other, "2") is None


def test_moves_follow_the_table() -> None:
    waiting = job("1")
    with pytest.raises(Internal):
        waiting.move(JobState.DONE)
    waiting.move(JobState.RUNNING)
    waiting.move(JobState.CANCELLING)
    assert waiting.status().state is JobState.CANCELLING
