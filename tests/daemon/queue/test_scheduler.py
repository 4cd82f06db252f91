from __future__ import annotations

from typing import Any

import pytest

from xditd.daemon.operations.counters import EventCounters
from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.queue.commands import Script, Task
from xditd.daemon.queue.fair_queue import FairQueue
from xditd.daemon.queue.jobs import Job
from xditd.daemon.queue.scheduler import Scheduler
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import (
    BadCheckpoint,
    BadRequest,
    Cancelled,
    DaemonStopping,
    Internal,
    WorkersLost,
    WorkersUnavailable,
    XditdError,
)
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Failed, Queued, Returned
from xditd.ipc.requests import GetStatus
from xditd.ipc.status import GroupState, JobState
from xditd.ipc.worker_messages import Done, Plug, RankFailed, RankTally, Unmap


class RecordingGroup:
    """A fake worker group: records commands, and answers when the test says so."""

    def __init__(self) -> None:
        self.state = GroupState.READY
        self.detail = ""
        self.sent: list[Any] = []
        self.cancels = 0
        self.ended: XditdError | None = None

    @property
    def is_idle(self) -> bool:
        return self.state is GroupState.READY

    @property
    def is_alive(self) -> bool:
        return self.state in (GroupState.READY, GroupState.BUSY)

    def send(self, make: Any) -> None:
        self.state = GroupState.BUSY
        self.sent.append(make(len(self.sent) + 1))

    def cancel_run(self) -> None:
        self.cancels += 1

    def end(self, error: XditdError) -> None:
        self.ended = error


class Bench:
    """A scheduler with a fake group and clients that record their replies."""

    def __init__(self, *scripts: Script[Any]) -> None:
        self.group = RecordingGroup()
        self.results: list[Any] = []
        self.replies: list[Reply] = []
        self.counters = EventCounters()
        queue = FairQueue(10, 10)
        self.scheduler = Scheduler(EventLoop(), self.group, self, self.counters, queue)  # type: ignore[arg-type]
        for script in scripts:
            self.scheduler.map_first(Task(script, self.results.append, self.results.append))
        self.scheduler.advance()

    def reply(self, _: Session, reply: Reply) -> None:
        self.replies.append(reply)

    def answer(self, *answers: Any) -> None:
        self.group.state = GroupState.READY
        self.scheduler.answered(self.group.sent[-1], answers)
        self.scheduler.advance()


def session(name: bytes = b"a", pid: int = 1) -> Session:
    return Session(name, "", ProcessIdentity(pid=pid, start_ticks=0), -1, "test")


OWNER = session()


def job(request_id: str, owner: Session = OWNER) -> Job:
    def script(_: Job) -> Script[Reply]:
        yield lambda number: Plug(op_number=number, component_id=request_id)
        return Returned(request_id=request_id)

    return Job(owner, GetStatus(request_id=request_id), script)


def done(rank: int) -> Done:
    return Done(group_token="token123", rank=rank, op_number=1, timings_ms={"x": rank + 1.0}, tally=RankTally())


def refused(rank: int, code: str = "bad_checkpoint") -> RankFailed:
    return RankFailed(group_token="token123", rank=rank, op_number=1, code=code, detail=f"of {rank}", is_fatal=False)


def plug_twice(log: list[str]) -> Script[str]:
    try:
        yield lambda number: Plug(op_number=number, component_id="a")
        yield lambda number: Plug(op_number=number, component_id="b")
    except BadCheckpoint as error:
        log.append(error.detail)
        yield lambda number: Unmap(op_number=number, component_id="a")
        raise
    finally:
        log.append("finally")
    return "plugged"


def test_commands_go_one_after_the_other_and_tasks_too() -> None:
    log: list[str] = []
    bench = Bench(plug_twice(log), plug_twice(log))
    for expected in range(1, 5):
        assert len(bench.group.sent) == expected
        bench.answer(done(0), done(1))
    assert bench.results == ["plugged", "plugged"]
    assert not bench.scheduler.has_task


def test_refusal_is_raised_in_the_script_which_cleans_up_first() -> None:
    log: list[str] = []
    bench = Bench(plug_twice(log))
    bench.answer(done(0), refused(1))
    assert log == ["of 1"]
    assert isinstance(bench.group.sent[-1], Unmap)
    assert bench.results == []
    bench.answer(done(0), done(1))
    assert isinstance(bench.results[0], BadCheckpoint)


def test_lost_group_closes_the_script() -> None:
    log: list[str] = []
    bench = Bench(plug_twice(log))
    lost = WorkersLost("gone")
    bench.scheduler.group_ended(lost)
    assert log == ["finally"]
    assert bench.results == [lost]
    assert not bench.scheduler.has_task


def test_rank_that_cannot_unmap_ends_the_group() -> None:
    bench = Bench(plug_twice([]))
    bench.answer(refused(0), refused(1))
    bench.answer(done(0), refused(1))
    assert isinstance(bench.group.ended, Internal)
    assert "rank 1 could not unmap" in bench.group.ended.detail


def test_task_that_needs_no_command_ends_at_once() -> None:
    def nothing() -> Script[str]:
        return "at once"
        yield

    bench = Bench(nothing(), plug_twice([]))
    assert bench.results == ["at once"]
    assert len(bench.group.sent) == 1


def test_what_frees_memory_goes_first_then_what_maps_and_then_jobs() -> None:
    def one(name: str) -> Script[None]:
        yield lambda number: Plug(op_number=number, component_id=name)

    bench = Bench(one("running"))
    bench.scheduler.submit(job("job"))
    for add, name in ((bench.scheduler.map_first, "map"), (bench.scheduler.unmap_first, "unmap")):
        add(Task(one(name), lambda _: None, lambda _: None))
    for _ in range(4):
        bench.answer(done(0))
    assert [command.component_id for command in bench.group.sent] == ["running", "unmap", "map", "job"]


def test_lost_group_ends_all_tasks_and_no_job_that_waits() -> None:
    bench = Bench(plug_twice([]), plug_twice([]))
    waiting = job("1")
    bench.scheduler.submit(waiting)
    lost = WorkersLost("gone")
    bench.group.state = GroupState.DEAD
    bench.scheduler.group_ended(lost)
    assert bench.results == [lost, lost]
    assert list(bench.scheduler) == [waiting]


def test_jobs_run_in_turn_and_are_answered_and_counted() -> None:
    bench = Bench()
    bench.scheduler.submit(job("1"))
    assert bench.replies == []  # its turn is now
    bench.scheduler.advance()
    second = job("2")
    bench.scheduler.submit(second)
    assert isinstance(bench.replies[-1], Queued)
    assert bench.replies[-1].ahead == 1
    bench.answer(done(0))
    assert Returned(request_id="1") in bench.replies
    assert bench.scheduler.running is second
    assert bench.counters.jobs["get_status", "done"] == 1


def test_job_that_waits_is_cancelled_at_once_and_one_that_runs_when_the_workers_let_go() -> None:
    bench = Bench()
    running, waiting = job("1"), job("2")
    bench.scheduler.submit(running)
    bench.scheduler.advance()
    bench.scheduler.submit(waiting)
    bench.scheduler.cancel_all(Cancelled("enough"))
    assert waiting.state is JobState.FAILED
    assert running.state is JobState.CANCELLING
    assert bench.group.cancels == 1
    bench.answer(done(0))
    assert [reply.request_id for reply in bench.replies if isinstance(reply, Failed)] == ["2", "1"]
    assert bench.counters.jobs["get_status", "cancelled"] == 2


def test_request_ids_are_a_sessions_own() -> None:
    bench = Bench()
    other = session(b"b")
    bench.scheduler.submit(job("1"))
    bench.scheduler.submit(job("1", other))
    with pytest.raises(BadRequest, match="request_id 1: still in use"):
        bench.scheduler.submit(job("1"))
    found = bench.scheduler.find(other, "1")
    assert found is not None
    assert found.session is other
    assert bench.scheduler.find(other, "2") is None


def test_no_job_is_taken_without_workers_or_while_stopping() -> None:
    bench = Bench()
    bench.scheduler.submit(job("1"))
    bench.scheduler.close(DaemonStopping("enough"))
    assert list(bench.scheduler) == []
    with pytest.raises(DaemonStopping):
        bench.scheduler.submit(job("2"))
    given_up = Bench()
    given_up.group.state, given_up.group.detail = GroupState.GIVEN_UP, "no GPU"
    with pytest.raises(WorkersUnavailable, match="no GPU; cure the cause"):
        given_up.scheduler.submit(job("1"))
