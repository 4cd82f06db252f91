from __future__ import annotations

import pytest

from xditd.daemon.queue.jobs import Job, JobQueue
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import BadRequest, Busy, Internal
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import GetStatus
from xditd.ipc.status import JobState


def session(name: bytes = b"a", pid: int = 1) -> Session:
    return Session(name, "", ProcessIdentity(pid=pid, start_ticks=0), -1, "test")


OWNER = session()


def job(request_id: str, owner: Session = OWNER) -> Job:
    def no_script(_: Job) -> None:
        raise AssertionError("not to be run")

    return Job(owner, GetStatus(request_id=request_id), no_script)  # type: ignore[arg-type]


def test_first_come_first_served() -> None:
    queue = JobQueue(10, 10)
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
    queue = JobQueue(2, 10)
    for number in range(2):
        queue.add(job(str(number)))
    with pytest.raises(Busy, match=r"2 requests wait already \(queue_limit 2\); retry"):
        queue.add(job("2"))
    queue.take()
    queue.add(job("2"))


def test_request_ids_are_a_sessions_own() -> None:
    queue = JobQueue(10, 10)
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


def test_share_of_one_client_is_bounded_and_the_others_still_get_in() -> None:
    queue = JobQueue(10, 2)
    queue.add(job("1"))
    queue.add(job("2", session(b"b")))  # another connection of the same process
    with pytest.raises(Busy, match=r"2 requests of this client wait already \(client_queue_limit 2\); retry in"):
        queue.add(job("3"))
    queue.add(job("3", session(b"c", pid=2)))


def test_busy_says_when_to_come_back_from_how_long_jobs_take() -> None:
    queue = JobQueue(1, 1)
    for _ in range(40):
        queue.add(job("1"))
        taken = queue.take()
        assert taken is not None
        assert taken.started_s is not None
        taken.started_s -= 3.0
        queue.remove(taken)
    queue.add(job("1"))
    with pytest.raises(Busy) as caught:
        queue.add(job("2"))
    assert caught.value.retry_after_s == pytest.approx(3.0, rel=0.05)
