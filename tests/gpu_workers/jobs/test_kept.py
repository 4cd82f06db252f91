"""Kept tensors: found by client and id, bounded, and freed with the client."""

from __future__ import annotations

import weakref

import pytest
import torch

from xditd.gpu_workers.jobs.kept import KeptTensors
from xditd.ipc.errors import UnknownKept
from xditd.ipc.processes import ProcessIdentity

ALICE, BOB = ProcessIdentity(pid=1, start_ticks=1), ProcessIdentity(pid=2, start_ticks=1)


def make(number: float, tokens: int = 4) -> torch.Tensor:
    return torch.full((1, tokens, 8), number)


def test_it_is_found_by_client_and_id() -> None:
    kept = KeptTensors()
    new = make(1)
    kept.keep(ALICE, "k1", new)
    assert kept.find(ALICE, "k1") is new
    for client, name in [(BOB, "k1"), (ALICE, "k2")]:
        with pytest.raises(UnknownKept, match=f"kept tensor {name}: not known to this worker; send it again"):
            kept.find(client, name)


def test_a_later_one_of_the_same_id_takes_its_place() -> None:
    kept = KeptTensors()
    kept.keep(ALICE, "k1", make(1))
    second = make(2)
    kept.keep(ALICE, "k1", second)
    assert kept.find(ALICE, "k1") is second
    assert len(kept) == 1


def test_the_least_recently_used_goes_first() -> None:
    kept = KeptTensors(max_count=2)
    for name in ("k1", "k2"):
        kept.keep(ALICE, name, make(0))
    kept.find(ALICE, "k1")
    kept.keep(ALICE, "k3", make(0))
    kept.find(ALICE, "k1")
    kept.find(ALICE, "k3")
    with pytest.raises(UnknownKept):
        kept.find(ALICE, "k2")


def test_bytes_are_bounded_for_each_client_by_itself() -> None:
    kept = KeptTensors(max_bytes=2 * make(0).nbytes)
    for name in ("k1", "k2", "k3"):
        for client in (ALICE, BOB):
            kept.keep(client, name, make(0))
    assert len(kept) == 4
    with pytest.raises(UnknownKept):
        kept.find(ALICE, "k1")
    kept.find(BOB, "k3")


def test_one_that_is_larger_than_the_bound_is_not_kept_and_pushes_nothing_out() -> None:
    kept = KeptTensors(max_bytes=2 * make(0).nbytes)
    for name in ("k1", "k2"):
        kept.keep(ALICE, name, make(0))
    kept.keep(ALICE, "k2", make(0, tokens=100))
    with pytest.raises(UnknownKept):
        kept.find(ALICE, "k2")  # nor is the older one of its id
    kept.find(ALICE, "k1")


def test_a_client_that_is_gone_frees_its_memory_and_no_other() -> None:
    kept = KeptTensors()
    kept.keep(ALICE, "k1", make(1))
    kept.keep(BOB, "k1", make(2))
    gone = weakref.ref(kept.find(ALICE, "k1"))
    kept.forget(ALICE)
    kept.forget(ALICE)
    assert gone() is None
    assert float(kept.find(BOB, "k1")[0, 0, 0]) == 2.0
