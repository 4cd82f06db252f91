"""Held tensors: found by client and id, freed by release, with the client, and with the job that fails."""

from __future__ import annotations

import weakref

import pytest
import torch

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.ipc.errors import LeaseLost
from xditd.ipc.processes import ProcessIdentity

ALICE, BOB = ProcessIdentity(pid=1, start_ticks=1), ProcessIdentity(pid=2, start_ticks=1)


def test_it_is_found_by_its_client_alone() -> None:
    held = HeldTensors()
    tensor = torch.zeros(2)
    held_id = held.hold(ALICE, tensor)
    assert held.find(ALICE, held_id, "cache") is tensor
    for client, name in [(BOB, held_id), (ALICE, "h99")]:
        with pytest.raises(LeaseLost, match=rf"^cache.k: its contents \({name}\) were in workers that have ended"):
            held.find(client, name, "cache.k")


def test_a_released_one_is_freed_and_an_unknown_id_is_no_error() -> None:
    held = HeldTensors()
    held_id = held.hold(ALICE, torch.zeros(2))
    other = held.hold(ALICE, torch.zeros(2))
    freed = weakref.ref(held.find(ALICE, held_id, ""))
    held.release(BOB, [held_id])
    assert freed() is not None
    held.release(ALICE, [held_id, "h99"])
    assert freed() is None
    assert len(held) == 1
    held.find(ALICE, other, "")


def test_those_of_a_client_go_with_it() -> None:
    held = HeldTensors()
    for client in (ALICE, BOB):
        held.hold(client, torch.zeros(2))
    held.forget(ALICE)
    held.forget(ALICE)
    assert len(held) == 1


def test_a_job_that_fails_holds_nothing_and_the_next_ids_are_those_of_a_rank_without_it() -> None:
    held = HeldTensors()
    first = held.hold(ALICE, torch.zeros(1))

    def fail() -> None:
        with held.undone_on_error(ALICE):
            held.hold(ALICE, torch.zeros(1))
            held.hold(ALICE, torch.zeros(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(held) == 1
    held.find(ALICE, first, "")
    with held.undone_on_error(ALICE):
        second = held.hold(ALICE, torch.zeros(1))
    assert (first, second) == ("h1", "h2")


def test_ids_of_two_groups_of_workers_differ() -> None:
    assert HeldTensors("a").hold(ALICE, torch.zeros(1)) != HeldTensors("b").hold(ALICE, torch.zeros(1))
