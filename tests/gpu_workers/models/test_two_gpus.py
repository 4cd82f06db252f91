"""Two NCCL ranks: the arena of one GPU is copied to the other, and both agree with plain diffusers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.multigpu

MIB = 2**20
NCCL_BYTES = 1024 * MIB
"""What NCCL keeps for good from its first collective on, at most."""

PROGRAM = Path(__file__).with_name("two_gpus.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("two_gpus")
    devices = os.environ.get("XDITD_TEST_DEVICES", "cuda:0,cuda:1").split(",")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), *devices], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(
        ranks=[load_file(folder / f"rank{rank}.safetensors") for rank in range(2)],
        facts=[json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)],
        reference=load_file(folder / "reference.safetensors"),
        lent=(folder / "lent.txt").read_text(),
    )


def test_the_second_rank_gets_one_peer_copy(made):
    assert made.facts[0]["total"] == 0
    assert made.facts[1]["peer"] == made.facts[1]["total"] > 30_000_000


@pytest.mark.parametrize("way", ["chosen", "broadcast"])
def test_both_ranks_hold_the_bytes_that_were_lent_and_give_their_memory_back(made, way):
    for facts in made.facts:
        assert facts[f"{way}: digest"] == made.lent
        assert facts[f"{way}: left"] < (64 * MIB if way == "chosen" else NCCL_BYTES)


def test_a_peer_copy_opens_no_context_on_the_lenders_gpu(made):
    """A context takes some 500 MiB there, where memory is short."""
    if not made.facts[0]["is direct"]:
        pytest.skip("the GPUs have no peer access to each other")
    assert made.facts[0]["chosen: taken"] < 64 * MIB
    assert made.facts[1]["chosen: taken"] < made.facts[1]["peer"] + 64 * MIB


def test_both_ranks_agree_with_plain_diffusers(made):
    for case, expected in made.reference.items():
        for results in made.ranks:
            error = float((results[f"{case}/0"] - expected).norm() / expected.norm())
            assert error <= 1e-5, f"{case}: {error:.2e}"


def test_repeats_have_the_same_bits(made):
    for results in made.ranks:
        for case in made.reference:
            assert torch.equal(results[f"{case}/0"], results[f"{case}/1"])
