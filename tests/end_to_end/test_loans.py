"""Loans that share memory, owners or names, on real workers."""

from __future__ import annotations

import pytest
import torch
from running_daemon import until
from safetensors.torch import load_file, save_file

from xditd.client import BadRequest, StaleSource
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


def test_a_prepared_component_finds_its_model_built(daemon, client):
    state = checkpoints.flux1_state_dict(1, double_blocks=1, single_blocks=3)  # no other test has so many
    built = client.status().counters.models_built
    client.prepare({name: tensor.to("meta") for name, tensor in state.items()}, label="prepared")
    until(lambda: "model built ahead of its lend label=prepared" in daemon.log_text(), "the model", daemon.log)
    with client.lend(state) as loan:
        assert loan.is_model_reused
    assert client.status().counters.models_built == built + 1


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


def test_tensors_that_were_not_written_are_not_copied_again(client, make_inputs, run):
    """At these addresses the workers of a CPU cannot view tensors, as those of another GPU cannot: they have copies."""
    state = checkpoints.flux1_state_dict(1)
    arena = Arena({name: (tensor.dtype, (tensor.numel() + 1,)) for name, tensor in state.items()})
    tensors = {name: arena.tensors[name][1:].view(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        tensors[name].copy_(tensor)
    inputs = make_inputs()
    every = 2 * sum(tensor.nbytes for tensor in state.values())  # two workers
    written = ["img_in.weight", "double_blocks.0.img_attn.qkv.weight"]
    some = 2 * sum(state[name].nbytes for name in written)
    loans = [client.lend(tensors)]

    def lend(generation: int, *changed: str, copied: int) -> torch.Tensor:
        loans.append(client.lend(tensors, generation=generation, changed=changed))
        assert (loans[-1].copied.host_to_host, loans[-1].copied.total) == (copied, copied)
        return run(client, loans[-1], inputs, steps=1)

    def fresh() -> torch.Tensor:
        with client.lend({name: tensor.clone() for name, tensor in tensors.items()}) as loan:
            return run(client, loan, inputs, steps=1)

    assert loans[0].copied.host_to_host == every
    before = run(client, loans[0], inputs, steps=1)
    for name in written:
        tensors[name].mul_(1.5)
    after = lend(1, *written, copied=some)
    assert torch.equal(after, fresh())
    assert not torch.equal(after, before)
    for name in written:
        tensors[name].copy_(state[name])
    assert torch.equal(lend(2, *written, copied=some), before)
    # Generations that the workers have not seen may have written anything.
    tensors["img_in.weight"].mul_(1.5)
    expected = fresh()
    assert torch.equal(lend(4, copied=every), expected)
    assert torch.equal(lend(5, copied=0), expected)
    with pytest.raises(BadRequest, match=r"changed names img_in, of which it has no tensor"):
        client.lend(tensors, generation=6, changed=["img_in"])
    with pytest.raises(BadRequest, match="give the next generation, too"):
        client.lend(tensors, changed=written)
    for loan in loans:
        loan.return_()
    tensors.clear()
    arena.close()


def test_a_patched_model_shares_the_copies_of_its_file(client, make_inputs, run, tmp_path):
    """Workers of a CPU copy a file whose tensors are not aligned, as GPUs copy every file."""
    path = tmp_path / "flux1.safetensors"
    for padding in range(0, 128, 8):
        save_file(checkpoints.flux1_state_dict(1), path, metadata={"padding": padding * "x"})
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") % 64 == 0:  # 8 bytes before it: no tensor is aligned to 64
                break
    name = "img_in.weight"
    state = load_file(path)
    arena = Arena.copy_of({name: 1.5 * state[name]})
    inputs = make_inputs()
    first = client.lend(path)
    every = 2 * sum(tensor.nbytes for tensor in state.values())  # two workers
    assert first.copied.host_to_host == every
    before = run(client, first, inputs, steps=1)
    patched = client.lend({**state, **arena.tensors})
    assert [tier.value for tier in patched.tiers] == ["file", "host_shm"]
    assert patched.copied.total == 0
    first.return_()
    after = run(client, patched, inputs, steps=1)
    with client.lend({key: tensor.clone() for key, tensor in (state | arena.tensors).items()}) as fresh:
        assert torch.equal(after, run(client, fresh, inputs, steps=1))
    assert not torch.equal(after, before)
    again = client.lend(path)
    assert again.copied.host_to_host == 2 * state[name].nbytes
    patched.return_()
    assert torch.equal(run(client, again, inputs, steps=1), before)
    again.return_()
    with client.lend(path) as loan:
        assert loan.copied.host_to_host == every
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
