"""Demo checkpoints: reproducible, with finite values, and without importing torch early."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xditd.client.demo import checkpoints

DIGEST = """
import hashlib
from xditd.client.demo import checkpoints
digest = hashlib.sha256()
for state in (checkpoints.flux1_state_dict(5), checkpoints.flux_vae_state_dict(5)):
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_same_seed_gives_the_same_bytes_in_another_process() -> None:
    digest = hashlib.sha256()
    for state in (checkpoints.flux1_state_dict(5), checkpoints.flux_vae_state_dict(5)):
        for name, tensor in state.items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == digest.hexdigest()


def test_importing_the_module_imports_no_torch() -> None:
    program = "import sys; import xditd.client.demo.checkpoints; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_seeds_differ() -> None:
    one, other = checkpoints.flux1_state_dict(0), checkpoints.flux1_state_dict(1)
    assert one.keys() == other.keys()
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_the_demo_is_small() -> None:
    assert sum(t.numel() for t in checkpoints.flux1_state_dict(0).values()) == 8_446_528
    assert sum(t.numel() for t in checkpoints.flux_vae_state_dict(0).values()) < 8_000_000


def test_files_hold_what_the_functions_return(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, write, make in (
        ("flux1", checkpoints.write_flux1, checkpoints.flux1_state_dict),
        ("vae", checkpoints.write_flux_vae, checkpoints.flux_vae_state_dict),
    ):
        path = tmp_path / f"{name}.safetensors"
        write(path, 2, dtype=torch.bfloat16)
        read, made = load_file(path), make(2, dtype=torch.bfloat16)
        assert read.keys() == made.keys()
        assert all(torch.equal(read[key], made[key]) for key in made)


@pytest.mark.parametrize("make", [checkpoints.flux1_state_dict, checkpoints.flux_vae_state_dict])
def test_every_value_is_finite_and_no_tensor_is_zero(make: object) -> None:
    assert callable(make)
    for name, tensor in make(0).items():
        assert tensor.isfinite().all(), name
        assert tensor.abs().max() > 0.01, name
