"""One bounded queue: order, positions, cancel at every stage."""

from __future__ import annotations

from typing import Any

from xditd.ipc.codec import encode
from xditd.ipc.replies import CancelNoted, Failed, Generated, Queued, StepDone
from xditd.ipc.requests import Cancel
from xditd.ipc.status import JobState


def cancel(client: Any, target: str) -> bool:
    noted = client.ask(Cancel(request_id="", target_request_id=target), CancelNoted)
    return bool(noted.was_found)


def test_queue_bound_is_a_typed_busy(client: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(component_id, steps=1000))
    client.wait_event(running, StepDone)
    waiting = [client.send(memory.generate(component_id, steps=1)) for _ in range(3)]
    failed = client.fail(memory.generate(component_id))
    assert failed.code == "busy"
    assert "retry" in failed.detail
    assert [job.state for job in client.status().jobs] == [JobState.RUNNING, *[JobState.QUEUED] * 3]
    assert cancel(client, running)
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
    assert cancel(client, first)
    client.wait_event(second, StepDone)

    def positions() -> list[tuple[int, str]]:
        told = [event for event in client.events if isinstance(event, Queued) and event.request_id == third]
        return [(event.ahead, event.reason) for event in told]

    client.wait_status(lambda _: len(positions()) > 1)  # told soon, but not with every move
    assert cancel(client, second)
    client.wait(third)
    assert positions() == [(2, "other requests go first"), (1, "other requests go first")]


def test_cancel_of_a_queued_job_ends_it_at_once(client: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    cancelled_before = client.status().counters.jobs_cancelled
    running = client.send(memory.generate(component_id, steps=1000))
    queued = client.send(memory.generate(component_id))
    assert cancel(client, queued)
    assert client.wait(queued).code == "cancelled"
    assert not cancel(client, queued)
    assert [job.request_id for job in client.status().jobs] == [running]
    twice = [client.send(Cancel(request_id="", target_request_id=running)) for _ in range(2)]
    assert all(isinstance(client.wait(request_id), CancelNoted) for request_id in twice)
    failed = client.wait(running)
    assert isinstance(failed, Failed)
    assert failed.code == "cancelled"
    assert client.status().counters.jobs_cancelled == cancelled_before + 2
    client.ask(memory.generate(component_id), Generated)


def test_cancel_of_nothing_is_told(client: Any) -> None:
    assert not cancel(client, "never-sent")


def test_cancel_reaches_no_other_session(client: Any, shared_daemon: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(component_id, steps=1000))
    client.wait_event(running, StepDone)
    assert not cancel(shared_daemon.client(), running)
    assert cancel(client, running)
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
    assert cancel(client, running)
    assert client.wait(running).code == "cancelled"
