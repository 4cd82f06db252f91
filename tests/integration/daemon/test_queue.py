"""The job queue: order, positions, and cancel at every stage."""

from __future__ import annotations

import os
import signal
from typing import Any

from xditd.ipc.codec import encode
from xditd.ipc.replies import CancelNoted, Failed, Generated, Queued, StepDone
from xditd.ipc.requests import Adopt, Cancel, Lend
from xditd.ipc.status import JobState, LeaseState


def cancel(client: Any, target: str) -> None:
    client.ask(Cancel(request_id="", target_request_id=target), CancelNoted)


def test_queue_bound_is_a_typed_busy(client: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(component_id, steps=1000))
    client.wait_event(running, StepDone)
    waiting = [client.send(memory.generate(component_id, steps=1)) for _ in range(3)]
    failed = client.fail(memory.generate(component_id))
    assert failed.code == "busy"
    assert "retry" in failed.detail
    assert [job.state for job in client.status().jobs] == [JobState.RUNNING, *[JobState.QUEUED] * 3]
    cancel(client, running)
    assert client.wait(running).code == "cancelled"
    for request_id in waiting:
        assert isinstance(client.wait(request_id), Generated)
    finished = [reply_id for reply_id in client.ended if reply_id in waiting]
    assert finished == waiting  # first come, first served


def test_position_is_told_and_moves_up(client: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    first = client.send(memory.generate(component_id, steps=1000))
    client.wait_event(first, StepDone)
    second = client.send(memory.generate(component_id, steps=1000))
    third = client.send(memory.generate(component_id, steps=1))
    cancel(client, first)
    client.wait_event(second, StepDone)

    def positions() -> list[tuple[int, str]]:
        told = [event for event in client.events if isinstance(event, Queued) and event.request_id == third]
        return [(event.ahead, event.reason) for event in told]

    # Announced soon, but not after every job; once more at the old position if the first job takes time to end.
    client.wait_status(lambda _: positions()[-1:] == [(1, "other requests go first")])
    cancel(client, second)
    client.wait(third)
    assert list(dict.fromkeys(positions())) == [(2, "other requests go first"), (1, "other requests go first")]


def test_cancel_of_a_queued_job_ends_it_at_once(client: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    cancelled_before = client.status().counters.jobs_cancelled
    running = client.send(memory.generate(component_id, steps=1000))
    queued = client.send(memory.generate(component_id))
    cancel(client, queued)
    assert client.wait(queued).code == "cancelled"
    cancel(client, queued)
    assert [job.request_id for job in client.status().jobs] == [running]
    twice = [client.send(Cancel(request_id="", target_request_id=running)) for _ in range(2)]
    assert all(isinstance(client.wait(request_id), CancelNoted) for request_id in twice)
    failed = client.wait(running)
    assert isinstance(failed, Failed)
    assert failed.code == "cancelled"
    assert client.status().counters.jobs_cancelled == cancelled_before + 2
    client.ask(memory.generate(component_id), Generated)


def test_cancel_of_a_lend_at_every_stage(client: Any, memory: Any) -> None:
    first = client.lend(memory.manifest())
    running = client.send(memory.generate(first.component_id, steps=1000))
    client.wait_event(running, StepDone)
    waiting = client.send(Lend(request_id="", manifest=memory.manifest(kind="vae")))
    cancel(client, waiting)
    assert client.wait(waiting).code == "cancelled"
    cancel(client, running)
    client.wait(running)
    # Between prepare and plug: a stopped rank keeps the lend there until the cancel was noted.
    pid = client.status().workers[1].pid
    os.kill(pid, signal.SIGSTOP)
    mapping = client.send(Lend(request_id="", manifest=memory.manifest(kind="vae")))
    client.wait_status(lambda status: [job.state for job in status.jobs] == [JobState.RUNNING])
    cancel(client, mapping)
    assert [job.state for job in client.status().jobs] == [JobState.CANCELLING]
    os.kill(pid, signal.SIGCONT)
    assert client.wait(mapping).code == "cancelled"
    status = client.status()
    assert [component.component_id for component in status.components] == [first.component_id]
    assert [worker.loaded for worker in status.workers] == [1, 1]
    cancel(client, mapping)
    client.lend(memory.manifest(kind="vae"))


def test_cancel_of_an_adoption_after_the_copy_maps_the_loan_again(client: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    pid = client.status().workers[1].pid
    os.kill(pid, signal.SIGSTOP)
    adopting = client.send(Adopt(request_id="", component_id=component_id))
    client.wait_status(lambda status: [job.state for job in status.jobs] == [JobState.RUNNING])
    cancel(client, adopting)
    os.kill(pid, signal.SIGCONT)
    assert client.wait(adopting).code == "cancelled"
    assert [component.state for component in client.status().components] == [LeaseState.LENT]
    client.ask(memory.generate(component_id), Generated)


def test_cancel_while_the_workers_start(start_daemon: Any, memory: Any) -> None:
    client = start_daemon(worker_flags=["--never-ready"]).client()
    lending = client.send(Lend(request_id="", manifest=memory.manifest()))
    client.wait_event(lending, Queued)
    cancel(client, lending)
    assert client.wait(lending).code == "cancelled"
    assert client.status().jobs == ()


def test_cancel_of_nothing_is_noted(client: Any) -> None:
    cancel(client, "never-sent")


def test_cancel_reaches_no_other_session(client: Any, shared_daemon: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(component_id, steps=1000))
    client.wait_event(running, StepDone)
    cancel(shared_daemon.client(), running)
    assert [job.state for job in client.status().jobs] == [JobState.RUNNING]
    cancel(client, running)
    client.wait(running)


def test_request_id_in_use_is_refused(client: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(component_id, steps=1000))
    client.wait_event(running, StepDone)
    request = memory.generate(component_id)
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    client.socket.send(encode(type(request)(**{**fields, "request_id": running})))
    refused = client.wait(running)
    assert refused.code == "bad_request"
    assert "still in use" in refused.detail
    cancel(client, running)
    assert client.wait(running).code == "cancelled"
