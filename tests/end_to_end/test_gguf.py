"""GGUF files through a real daemon with two ranks: lent as they are, and with the results of plain diffusers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import z_image_models
from gguf_files import dequantise, write_model
from safetensors.torch import load_file

from xditd.client import BadCheckpoint, StaleSource, Unsupported
from xditd.client.cli.main import main
from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.families.z_image.config import ZImageConfig

BAR = 1e-6
Z_IMAGE = ZImageConfig(hidden=768, layers=1, refiners=1, text_channels=64)
BLOCKS = ("double_blocks.", "single_blocks.", "layers.")


def packed_as(kind):
    return lambda name: kind if name.startswith(BLOCKS) else None


def meant(state, packed):
    return {name: dequantise(packed[name][1], packed[name][0], torch.float32) if name in packed else each
            for name, each in state.items()}  # fmt: skip


@pytest.fixture(scope="module")
def state(files):
    return load_file(files.transformer)


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_flux1_agrees_with_diffusers(client, state, tmp_path, make_inputs, run, relative_error, kind):
    path = tmp_path / f"flux1-{kind}.gguf"
    packed = write_model(path, state, packed_as(kind), "flux")
    inputs = make_inputs(15, 112)
    with client.lend(path, compute_dtype="float32") as loan:
        assert (loan.family, [tier.value for tier in loan.tiers]) == ("flux1", ["file"])
        assert loan.facts.bytes_by_format == {kind: sum(blocks.numel() for _, blocks in packed.values())}
        first = run(client, loan, inputs)
        assert torch.equal(run(client, loan, inputs), first)
    expected = reference.reference_latents(
        reference.transformer_from(meant(state, packed)),
        prompt_embeds=inputs.prompt_embeds,
        pooled_prompt_embeds=inputs.pooled_prompt_embeds,
        noise=inputs.noise,
        height=inputs.pixels,
        width=inputs.pixels,
        steps=4,
    )
    assert relative_error(first, expected) <= BAR


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_z_image_agrees_with_diffusers(client, tmp_path, relative_error, kind):
    state = z_image_models.state_dict(0, Z_IMAGE, names=z_image_models.COMFYUI)
    path = tmp_path / f"z_image-{kind}.gguf"
    packed = write_model(path, state, packed_as(kind), "lumina2")
    given = z_image_models.inputs((7, 40), ((8, 12), (6, 4)))
    with client.lend(path, compute_dtype="float32") as loan:
        assert loan.family == "z_image"
        (found,) = client.call(loan, given)
    with torch.no_grad():
        expected = z_image_models.reference(meant(state, packed), Z_IMAGE)(**given, return_dict=False)[0]
    for ours, right in zip(found, expected, strict=True):
        assert relative_error(ours, right) <= BAR


def test_a_file_that_is_rewritten_is_not_used(client, state, tmp_path, make_inputs, run):
    path = tmp_path / "x.gguf"
    write_model(path, state, packed_as("q8_0"), "flux")
    loan = client.lend(path)
    run(client, loan, make_inputs())
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\1" * 32)
    with pytest.raises(StaleSource, match=r"x\.gguf: changed since it was lent"):
        run(client, loan, make_inputs())
    with client.lend(path) as again:
        run(client, again, make_inputs())


def test_other_models_and_damaged_files_are_named(client, state, tmp_path):
    path = tmp_path / "x.gguf"
    other = {"input_blocks.0.0.weight": torch.ones(320, 4, 3, 3), "label_emb.0.0.weight": torch.ones(1280, 2816)}
    write_model(path, other, packed_as("q8_0"), "sdxl")
    with pytest.raises(Unsupported, match=r"/x\.gguf: Stable Diffusion XL cannot be run"):
        client.lend(path)
    write_model(path, {name: each for name, each in state.items() if "linear1" not in name}, packed_as("q8_0"), "flux")
    with pytest.raises(BadCheckpoint, match=r"/x\.gguf: checkpoint does not fit flux1.*single_blocks\.0\.linear1"):
        client.lend(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="the file is truncated"):
        client.lend(path)


def test_the_command_generates_from_it(daemon, files, state, tmp_path: Path, capsys):
    path = tmp_path / "x.gguf"
    write_model(path, state, packed_as("q8_0"), "flux")
    command = [
        "generate",
        "--runtime-dir",
        str(daemon.runtime_dir),
        "--transformer",
        str(path),
        "--vae",
        str(files.vae),
    ]
    command += ["--random-embeds", "1", "--text-tokens", "16", "--size", "64x64", "--steps", "2"]
    assert main([*command, "-o", str(tmp_path / "x.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert (tmp_path / "x.png").stat().st_size > 0
