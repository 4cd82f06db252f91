"""Loans that share memory, owners or names, on real workers."""

from __future__ import annotations

import pytest
import torch

from xditd.client import StaleSource
from xditd.client.arenas import Arena
from xditd.client.demo import checkpoints


def test_two_clients_of_one_process_keep_their_own_loans(daemon, files, make_inputs, run):
    inputs = make_inputs()
    with daemon.connect() as first, daemon.connect() as second:
        theirs, ours = first.lend(files.transformer), second.lend(files.transformer)
        expected = run(first, theirs, inputs)
        first.close()
        assert torch.equal(run(second, ours, inputs), expected)
    assert daemon.status().components == ()


def test_a_component_may_be_used_by_another_client(daemon, client, transformer, make_inputs, run):
    inputs = make_inputs()
    with daemon.connect() as other:
        assert torch.equal(run(other, transformer.component_id, inputs), run(client, transformer, inputs))


def test_a_new_generation_replaces_the_old_one(client, make_inputs, run):
    arena = Arena.copy_of(checkpoints.flux1_state_dict(1))
    inputs = make_inputs()
    loan = client.lend(arena.tensors)
    before = run(client, loan, inputs)
    arena.tensors["img_in.weight"].mul_(1.5)
    newer = client.lend(arena.tensors, generation=1)
    assert not newer.is_reused
    after = run(client, newer, inputs)
    assert not torch.equal(after, before)
    with pytest.raises(StaleSource):
        client.lend(arena.tensors, generation=0)
    assert torch.equal(run(client, newer, inputs), after)
    newer.return_()
    loan.return_()
    arena.close()


def test_two_components_in_one_arena(client, make_inputs, run):
    one, two = checkpoints.flux1_state_dict(1), checkpoints.flux1_state_dict(2)
    arena = Arena.copy_of({**{f"1.{n}": t for n, t in one.items()}, **{f"2.{n}": t for n, t in two.items()}})
    inputs = make_inputs()

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name[2:]: tensor for name, tensor in arena.tensors.items() if name.startswith(prefix)}

    first, second = client.lend(part("1.")), client.lend(part("2."))
    before = run(client, second, inputs)
    first.return_()
    assert torch.equal(run(client, second, inputs), before)
    second.return_()
    arena.close()
