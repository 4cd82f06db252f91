"""What workers keep of a client's conditioning: found by id and dtype, bounded, and gone with the client."""

from __future__ import annotations

import pytest
import torch

from xditd.gpu_workers.families.flux1.conditionings import Conditioning, KeptConditionings
from xditd.ipc.errors import UnknownConditioning
from xditd.ipc.processes import ProcessIdentity

ALICE, BOB = ProcessIdentity(pid=1, start_ticks=1), ProcessIdentity(pid=2, start_ticks=1)
F32, BF16 = torch.float32, torch.bfloat16


def make(number: float, tokens: int = 4) -> Conditioning:
    return Conditioning(torch.full((1, tokens, 8), number), torch.full((1, 8), number))


def test_it_is_found_by_client_id_and_dtype() -> None:
    kept = KeptConditionings()
    new = make(1)
    kept.keep(ALICE, "c1", F32, new)
    assert kept.find(ALICE, "c1", F32) is new
    for client, name, dtype in [(BOB, "c1", F32), (ALICE, "c2", F32), (ALICE, "c1", BF16)]:
        with pytest.raises(UnknownConditioning, match=f"conditioning {name}: not kept for a model in {dtype}"):
            kept.find(client, name, dtype)


def test_a_later_one_of_the_same_id_takes_its_place() -> None:
    kept = KeptConditionings()
    kept.keep(ALICE, "c1", F32, make(1))
    second = make(2)
    kept.keep(ALICE, "c1", F32, second)
    assert kept.find(ALICE, "c1", F32) is second
    assert len(kept) == 1


def test_the_least_recently_used_goes_first() -> None:
    kept = KeptConditionings(max_count=2)
    for name in ("c1", "c2"):
        kept.keep(ALICE, name, F32, make(0))
    kept.find(ALICE, "c1", F32)
    kept.keep(ALICE, "c3", F32, make(0))
    kept.find(ALICE, "c1", F32)
    kept.find(ALICE, "c3", F32)
    with pytest.raises(UnknownConditioning):
        kept.find(ALICE, "c2", F32)


def test_bytes_are_bounded_for_each_client_by_itself() -> None:
    one = make(0).size_bytes
    kept = KeptConditionings(max_bytes=2 * one)
    for name in ("c1", "c2", "c3"):
        for client in (ALICE, BOB):
            kept.keep(client, name, F32, make(0))
    assert len(kept) == 4
    kept.keep(ALICE, "large", F32, make(0, tokens=100))
    with pytest.raises(UnknownConditioning):
        kept.find(ALICE, "large", F32)
    kept.find(BOB, "c3", F32)


def test_a_client_that_is_gone_frees_its_memory_and_no_other() -> None:
    import weakref

    kept = KeptConditionings()
    kept.keep(ALICE, "c1", F32, make(1))
    kept.keep(BOB, "c1", F32, make(2))
    gone = weakref.ref(kept.find(ALICE, "c1", F32).prompt_embeds)
    kept.forget(ALICE)
    kept.forget(ALICE)
    assert gone() is None
    assert float(kept.find(BOB, "c1", F32).pooled[0, 0]) == 2.0


def test_one_row_serves_many_without_a_copy() -> None:
    one = make(1)
    many = one.repeated(3)
    assert many.prompt_embeds.shape == (3, 4, 8)
    assert many.pooled.shape == (3, 8)
    assert many.prompt_embeds.data_ptr() == one.prompt_embeds.data_ptr()
