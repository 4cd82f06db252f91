"""A result is right when it has the bits of its own checkpoint and seed, and no others."""

from __future__ import annotations

import oracle
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def latents():
    return {
        (name, seed): torch.full((1, 16, 4, 4), float(name) + seed / 10)
        for name in oracle.CHECKPOINTS
        for seed in oracle.SEEDS
    }


@pytest.fixture
def known(latents, tmp_path):
    references = {f"{name}/{seed}": oracle.digest(tensor) for (name, seed), tensor in latents.items()}
    oracle.keep_references(references, tmp_path)
    return oracle.Oracle(tmp_path)


def test_the_same_bits_are_right(known, latents):
    assert all(known.is_right(name, seed, tensor) for (name, seed), tensor in latents.items())


def test_one_bit_less_is_wrong(known, latents):
    tensor = latents["1", 0].clone()
    tensor.view(torch.int32)[0, 0, 0, 0] ^= 1
    assert not known.is_right("1", 0, tensor)


@pytest.mark.parametrize(("name", "seed"), [("2", 0), ("1", 1)])
def test_the_result_of_another_checkpoint_or_seed_is_wrong(known, latents, name, seed):
    assert not known.is_right("1", 0, latents[name, seed])


def test_references_that_cannot_be_told_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 jobs gave 1"):
        oracle.keep_references({"1/0": "same", "2/0": "same"}, tmp_path)


def test_checkpoints_of_one_size_and_one_with_a_nan(tmp_path):
    """Rewriting a lent file with another one must not be seen by its size."""
    oracle.write_checkpoints(tmp_path)
    sizes = {oracle.checkpoint_path(tmp_path, name).stat().st_size for name in oracle.CHECKPOINTS}
    assert len(sizes) == 1
    with_nan = load_file(oracle.checkpoint_path(tmp_path, oracle.NOT_FINITE))
    assert sum(int(tensor.isnan().sum()) for tensor in with_nan.values()) == 1


def test_a_copy_replaces_the_file_that_somebody_may_map(tmp_path):
    for name in oracle.CHECKPOINTS:
        oracle.checkpoint_path(tmp_path, name).write_text(name)
    copy = tmp_path / "copy.safetensors"
    oracle.copy_checkpoint(tmp_path, "1", copy)
    with copy.open() as mapped:
        oracle.copy_checkpoint(tmp_path, "2", copy)
        assert (mapped.read(), copy.read_text()) == ("1", "2")
