"""Loans: the same bytes are mapped once, rewritten bytes again, on all ranks or none, and unmapped on return."""

from __future__ import annotations

from typing import Any

import pytest

from xditd.ipc.errors import StaleSource
from xditd.ipc.replies import Failed, Generated, Returned, StepDone
from xditd.ipc.requests import Lend, ReturnLoan
from xditd.ipc.tensors import TensorSpec


def lend(manifest: Any) -> Lend:
    return Lend(request_id="", manifest=manifest)


def give_back(component_id: str) -> ReturnLoan:
    return ReturnLoan(request_id="", component_id=component_id)


def test_same_bytes_again_are_answered_at_once_and_returned_twice(client: Any, memory: Any) -> None:
    first = client.lend(memory.manifest())
    plugs = client.status().counters.plugs
    again = client.lend(memory.manifest())
    assert again.is_reused
    assert again.component_id == first.component_id
    assert again.copied.total == 0
    assert client.status().counters.plugs == plugs
    client.ask(give_back(first.component_id), Returned)
    client.ask(memory.generate(first.component_id), Generated)
    client.ask(give_back(first.component_id), Returned)
    assert client.fail(memory.generate(first.component_id)).code == "unknown_component"
    assert client.fail(give_back(first.component_id)).code == "unknown_component"


def test_two_lends_of_the_same_bytes_at_once_are_one_loan(client: Any, memory: Any) -> None:
    first, second = client.send(lend(memory.manifest())), client.send(lend(memory.manifest()))
    assert client.wait(first).component_id == client.wait(second).component_id
    assert len(client.status().components) == 1


def test_newer_generation_is_prepared_again_under_the_same_id(client: Any, memory: Any) -> None:
    first = client.lend(memory.manifest())
    plugs = client.status().counters.plugs
    newer = client.lend(memory.manifest(generation=2))
    assert newer.component_id == first.component_id
    assert not newer.is_reused
    status = client.status()
    assert status.counters.plugs == plugs + 1
    assert [component.generation for component in status.components] == [2]
    assert [worker.loaded for worker in status.workers] == [1, 1]


def test_older_generation_is_refused(client: Any, memory: Any) -> None:
    client.lend(memory.manifest(generation=2))
    failed = client.fail(lend(memory.manifest(generation=1)))
    assert failed.code == StaleSource.code
    assert "generation 1" in failed.detail


def test_refusal_of_one_rank_leaves_nothing_on_any(client: Any, memory: Any, fake: Any) -> None:
    failed = client.fail(lend(memory.manifest(label=fake.REFUSED_LABEL)))
    assert (failed.code, failed.detail) == ("bad_checkpoint", "tensor final.weight is missing")
    assert client.status().components == ()
    client.lend(memory.manifest())
    assert [worker.loaded for worker in client.status().workers] == [1, 1]


def test_manifest_that_contradicts_itself_is_refused(client: Any, memory: Any) -> None:
    sound = memory.manifest()
    tensors = (
        TensorSpec("a", "float32", (4,), 0, 0),
        TensorSpec("a", "float32", (4096,), 0, 4),
        TensorSpec("b", "bool", (1,), 7, 0),
    )
    manifest = type(sound)(kind=sound.kind, label="odd", blocks=sound.blocks, tensors=tensors)
    failed = client.fail(lend(manifest))
    assert failed.code == "bad_request"
    assert "tensor a is listed twice" in failed.detail
    assert "tensor b is in block 7 of 1" in failed.detail


def test_loan_taken_back_in_mid_job(client: Any, memory: Any) -> None:
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, steps=1000))
    queued = client.send(memory.generate(lent.component_id))
    client.wait_event(running, StepDone)
    returning = client.send(give_back(lent.component_id))
    ended = [client.wait(queued), client.wait(running), client.wait(returning)]
    assert [reply.code for reply in ended[:2] if isinstance(reply, Failed)] == ["lease_lost", "lease_lost"]
    assert "took it back" in ended[1].detail
    assert isinstance(ended[2], Returned)
    assert [worker.loaded for worker in client.status().workers] == [0, 0]


def test_loan_serves_other_clients_but_only_its_owner_takes_it_back(
    client: Any, shared_daemon: Any, start_lender: Any, memory: Any
) -> None:
    _, component_id = start_lender(shared_daemon)
    client.ask(memory.generate(component_id), Generated)
    failed = client.fail(give_back(component_id))
    assert failed.code == "not_permitted"
    assert len(client.status().components) == 1


@pytest.mark.parametrize("component_id", ["transformer-1-000000", "../../etc/passwd"])
def test_unknown_component_is_named(client: Any, memory: Any, component_id: str) -> None:
    failed = client.fail(memory.generate(component_id))
    assert failed.code == "unknown_component"
    assert component_id in failed.detail
