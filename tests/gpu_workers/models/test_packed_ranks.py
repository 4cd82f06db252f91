"""Packed checkpoints on two ranks agree with diffusers' classes on the weights that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import z_image_models
from forked_programs import ProgramServer, load_program
from packed_checkpoints import FORMATS
from safetensors.torch import load_file

from xditd.gpu_workers.families.flux1 import reference

PROGRAM = Path(__file__).with_name("packed_ranks.py")
BAR = 1e-6
packed_ranks = load_program(PROGRAM)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("packed_ranks")
    done = fork_program(PROGRAM, folder)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "results.safetensors")


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """The checkpoints that the ranks made, too."""
    checkpoints: dict[str, Any] = packed_ranks.checkpoints()
    return checkpoints


def error(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours - right).abs().max() / right.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("packed_format", FORMATS)
def test_two_ranks_agree_with_plain_diffusers(
    results: dict[str, torch.Tensor], made: dict[str, Any], packed_format: str
) -> None:
    given = packed_ranks.flux1_given()
    expected = reference.reference_latents(
        reference.transformer_from(made[f"flux1/{packed_format}"].meant),
        prompt_embeds=given["prompt_embeds"],
        pooled_prompt_embeds=given["pooled"],
        noise=given["noise"],
        **packed_ranks.SIZE,
    )
    assert error(results[f"flux1/{packed_format}"], expected) <= BAR
    module = z_image_models.reference(made[f"z_image/{packed_format}"].meant)
    with torch.no_grad():
        rows = module(**z_image_models.inputs(*packed_ranks.Z_IMAGE), return_dict=False)[0]
    for number, row in enumerate(rows):
        assert error(results[f"z_image/{packed_format}/{number}"], row) <= BAR
