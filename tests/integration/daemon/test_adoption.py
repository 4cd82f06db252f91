"""Revoked and adopted components, at the same time as jobs, exits of clients and restarts of the group."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from xditd.ipc.replies import Adopted, Farewell, Generated, Queued, Returned, Revoked, StepDone
from xditd.ipc.requests import Adopt, Cancel, Goodbye, Lend, ReturnLoan, Revoke
from xditd.ipc.status import GroupState, LeaseState


@pytest.fixture
def daemon(start_daemon: Any) -> Any:
    return start_daemon()


def adopt(component_id: str) -> Adopt:
    return Adopt(request_id="", component_id=component_id)


def revoke(component_id: str) -> Revoke:
    return Revoke(request_id="", component_id=component_id)


def test_adopted_component_outlives_its_client_until_it_is_revoked(daemon: Any, memory: Any) -> None:
    owner, other = daemon.ready_client(), daemon.client()
    component_id = owner.lend(memory.manifest()).component_id
    adopted = owner.ask(adopt(component_id), Adopted)
    assert adopted.copied.host_to_host == 2 * 64  # over both ranks
    again = other.ask(adopt(component_id), Adopted)
    assert again.copied.total == 0
    owner.ask(Goodbye(request_id=""), Farewell)
    (component,) = other.status().components
    assert (component.state, component.owner_pid, component.component_id) == (LeaseState.ADOPTED, 0, component_id)
    other.ask(memory.generate(component_id), Generated)
    other.ask(revoke(component_id), Revoked)
    assert other.status().components == ()
    assert [worker.loaded for worker in other.status().workers] == [0, 0]
    failed = other.fail(memory.generate(component_id))
    assert failed.code == "lease_lost"
    assert f"revoked by process {os.getpid()}" in failed.detail


def test_owner_may_return_what_somebody_adopted_and_lend_it_anew(daemon: Any, memory: Any) -> None:
    client = daemon.ready_client()
    first = client.lend(memory.manifest()).component_id
    client.ask(adopt(first), Adopted)
    client.ask(ReturnLoan(request_id="", component_id=first), Returned)
    second = client.lend(memory.manifest())
    assert not second.is_reused
    assert second.component_id != first
    states = {component.component_id: component.state for component in client.status().components}
    assert states == {first: LeaseState.ADOPTED, second.component_id: LeaseState.LENT}


def test_adoption_waits_for_the_running_job(daemon: Any, memory: Any) -> None:
    client = daemon.ready_client()
    component_id = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(component_id, steps=20))
    client.wait_event(running, StepDone)
    adopting = client.send(adopt(component_id))
    after = client.send(memory.generate(component_id))
    assert isinstance(client.wait(after), Generated)
    assert client.ended[-3:] == [running, adopting, after]


def test_adopted_component_goes_with_the_workers(daemon: Any, memory: Any) -> None:
    client = daemon.ready_client()
    kept = client.lend(memory.manifest()).component_id
    gone = client.lend(memory.manifest(kind="vae")).component_id
    client.ask(adopt(gone), Adopted)
    os.kill(client.status().workers[0].pid, signal.SIGKILL)
    client.wait_status(lambda status: (status.group_state, status.counters.group_starts) == (GroupState.READY, 2))
    client.ask(memory.generate(kept), Generated)
    assert [component.component_id for component in client.status().components] == [kept]
    failed = client.fail(ReturnLoan(request_id="", component_id=gone))
    assert failed.code == "lease_lost"
    assert "adopted, so it was lost with the workers" in failed.detail


def test_client_that_dies_before_the_copy_takes_its_loan_along(daemon: Any, memory: Any, start_lender: Any) -> None:
    client = daemon.ready_client()
    own = client.lend(memory.manifest()).component_id
    lender, component_id = start_lender(daemon)
    running = client.send(memory.generate(own, steps=1000))
    client.wait_event(running, StepDone)
    adopting = client.send(adopt(component_id))
    client.wait_event(adopting, Queued)
    lender.kill()
    failed = client.wait(adopting)
    assert failed.code == "lease_lost"
    assert "its process has exited" in failed.detail
    client.send(Cancel(request_id="", target_request_id=running))
    client.wait_status(lambda status: [component.component_id for component in status.components] == [own])


def test_cancelled_adoption_leaves_the_loan(daemon: Any, memory: Any) -> None:
    client = daemon.ready_client()
    component_id = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(component_id, steps=1000))
    client.wait_event(running, StepDone)
    adopting = client.send(adopt(component_id))
    client.send(Cancel(request_id="", target_request_id=adopting))
    assert client.wait(adopting).code == "cancelled"
    client.send(Cancel(request_id="", target_request_id=running))
    client.wait(running)
    assert client.status().components[0].state is LeaseState.LENT
    client.ask(memory.generate(component_id), Generated)


def test_revoked_loan_ends_its_jobs_and_its_owner_hears_why(daemon: Any, memory: Any) -> None:
    owner, operator = daemon.ready_client(), daemon.client()
    component_id = owner.lend(memory.manifest()).component_id
    running = owner.send(memory.generate(component_id, steps=1000))
    owner.wait_event(running, StepDone)
    waiting = owner.send(memory.generate(component_id))
    twice = [operator.send(revoke(component_id)) for _ in range(2)]
    operator.status()  # answered after the adoption: the owner's return came too late
    returning = owner.send(ReturnLoan(request_id="", component_id=component_id))
    for request_id in (running, waiting):
        assert owner.wait(request_id).code == "lease_lost"
    assert isinstance(operator.wait(twice[0]), Revoked)
    # Answered when nothing is mapped any more, or told that this is so already.
    for answer in (operator.wait(twice[1]), owner.wait(returning)):
        assert isinstance(answer, (Revoked, Returned)) or answer.code == "lease_lost"
    assert owner.status().components == ()
    assert owner.fail(memory.generate(component_id)).code == "lease_lost"
    owner.lend(memory.manifest())


def test_revoked_while_it_is_being_lent(daemon: Any, memory: Any) -> None:
    client = daemon.ready_client()
    first = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(first, steps=1000))
    client.wait_event(running, StepDone)
    lending = client.send(Lend(request_id="", manifest=memory.manifest(kind="vae")))
    assert client.fail(revoke("vae-2-000000")).code == "unknown_component"
    client.send(Cancel(request_id="", target_request_id=running))
    client.wait(lending)
