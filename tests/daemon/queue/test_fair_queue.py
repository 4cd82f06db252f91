from __future__ import annotations

import pytest

from xditd.daemon.queue.fair_queue import FairQueue
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import Busy
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import GetStatus


def session(pid: int) -> Session:
    return Session(b"", "", ProcessIdentity(pid=pid, start_ticks=0), -1, "test")


def job(owner: Session, name: str = "1") -> Job:
    return Job(owner, GetStatus(request_id=name), lambda _: pytest.fail("not to be run"))


def name_of(job: Job) -> str:
    return job.request.request_id


def names(queue: FairQueue) -> str:
    found = []
    while (taken := queue.take()) is not None:
        found.append(name_of(taken))
    return " ".join(found)


def fill(*rows: tuple[Session, str]) -> FairQueue:
    queue = FairQueue(100, 100)
    for owner, text in rows:
        for name in text.split():
            queue.add(job(owner, name))
    return queue


def test_clients_take_turns_and_each_is_served_in_order() -> None:
    rows = ((session(1), "a1 a2 a3 a4"), (session(2), "b1"), (session(3), "c1 c2"))
    assert [name_of(each) for each in fill(*rows)] == ["a1", "b1", "c1", "a2", "c2", "a3", "a4"]
    assert names(fill(*rows)) == "a1 b1 c1 a2 c2 a3 a4"


def test_connections_of_one_process_share_its_turn() -> None:
    assert names(fill((session(1), "a1 a2"), (session(1), "A1 A2"), (session(2), "b1 b2 b3"))) == "a1 b1 A1 b2 a2 b3 A2"


def test_late_comer_does_not_wait_for_what_others_have_queued() -> None:
    queue = fill((session(1), "a1 a2 a3"))
    assert queue.take() is not None
    queue.add(job(session(2), "b1"))
    assert names(queue) == "a2 b1 a3"


def test_removed_job_leaves_the_place_of_its_client() -> None:
    one, two = session(1), session(2)
    queue = fill((one, "a1 a2"), (two, "b1"))
    queue.remove(next(iter(queue)))
    assert len(queue) == 2
    assert [name_of(each) for each in queue.of_process(one.process)] == ["a2"]
    queue.remove(next(each for each in queue if name_of(each) == "b1"))
    assert queue.of_process(two.process) == []
    assert names(queue) == "a2"
    assert len(queue) == 0


def test_bound_counts_those_who_wait() -> None:
    queue = FairQueue(2, 10)
    for pid in range(2):
        queue.add(job(session(pid)))
    with pytest.raises(Busy, match=r"2 requests wait already \(queue_limit 2\); retry"):
        queue.add(job(session(2)))
    queue.take()
    queue.add(job(session(2)))


def test_share_of_one_client_is_bounded_and_the_others_still_get_in() -> None:
    queue = FairQueue(10, 2)
    queue.add(job(session(1)))
    queue.add(job(session(1)))  # another connection of the same process
    with pytest.raises(Busy, match=r"2 requests of this client wait already \(client_queue_limit 2\); retry in"):
        queue.add(job(session(1)))
    queue.add(job(session(2)))


def test_busy_says_when_to_come_back_from_how_long_jobs_take() -> None:
    queue = FairQueue(1, 1)
    for _ in range(40):
        queue.note_duration(3.0)
    queue.add(job(session(1)))
    with pytest.raises(Busy) as caught:
        queue.add(job(session(2)))
    assert caught.value.retry_after_s == pytest.approx(3.0, rel=0.05)
