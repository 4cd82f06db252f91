"""Packed checkpoints through a real daemon with two workers: lent as they are, run, and shown with their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import Packed, pack
from safetensors.torch import load_file, save_file
from text_checkpoints import t5_state_dict

from xditd.client.cli.status_text import describe
from xditd.gpu_workers.families.flux1 import reference
from xditd.ipc.errors import BadCheckpoint, Unsupported

BAR = 1e-6


@pytest.fixture(scope="module")
def state(files) -> dict[str, torch.Tensor]:
    return load_file(files.transformer)


def latents_of(client, loan, inputs) -> torch.Tensor:
    job = client.generate(
        loan, inputs.conditioning, height=inputs.pixels, width=inputs.pixels, steps=2, noise=inputs.noise
    )
    return job.result().latents


def expected(packed: Packed, inputs: Any) -> torch.Tensor:
    return reference.reference_latents(
        reference.transformer_from(packed.meant),
        prompt_embeds=inputs.prompt_embeds,
        pooled_prompt_embeds=inputs.pooled_prompt_embeds,
        noise=inputs.noise,
        height=inputs.pixels,
        width=inputs.pixels,
        steps=2,
    )


@pytest.mark.parametrize("packed_format", ["int8_convrot", "old", "plain"])
def test_a_file_is_lent_as_it_is_and_generates(client, state, tmp_path: Path, make_inputs, packed_format: str) -> None:
    packed = pack(state, packed_format, torch.float32)
    inputs = make_inputs()
    loan = client.lend(packed.save(tmp_path / "x.safetensors"), compute_dtype="float32")
    found = latents_of(client, loan, inputs)
    right = expected(packed, inputs)
    assert float((found - right).abs().max() / right.abs().max()) <= BAR
    (name,) = loan.facts.bytes_by_format
    status = client.status()
    (shown,) = [each for each in status.components if each.component_id == loan.component_id]
    assert shown.facts == loan.facts
    assert loan.facts.scratch_bytes == 4 * max(packed.meant[each].numel() for each in packed.weights)
    assert loan.lent_bytes < sum(tensor.nbytes for tensor in state.values()) / 3
    (products,) = [each for each in status.packed_products if each.format == name]
    assert products.reference > 0
    assert products.native == 0
    text = describe(status)
    assert f"{name} " in text
    assert "DEQUANTISED" in text


def test_the_same_file_in_two_compute_dtypes_is_two_components(client, state, tmp_path: Path) -> None:
    path = pack(state, "float8", torch.bfloat16).save(tmp_path / "x.safetensors")
    first, second, again = (client.lend(path, compute_dtype=each) for each in ("bfloat16", "float32", "bfloat16"))
    assert first.component_id == again.component_id != second.component_id
    assert again.is_reused
    assert (first.facts.dtype, second.facts.dtype) == ("bfloat16", "float32")


def test_a_packed_text_encoder_computes_in_float32(client) -> None:
    """As from a plain file of the weights dequantised into float32, to the last bit."""
    packed = pack(t5_state_dict(0), "old", torch.float32)
    tokens = torch.arange(12)[None]
    with client.lend(packed.tensors) as loan:
        assert loan.facts.dtype == "float32"
        found = client.encode_text(loan, tokens)
    with client.lend(packed.meant) as loan:
        right = client.encode_text(loan, tokens)
    assert torch.equal(found.hidden_states, right.hidden_states)


def test_bad_scales_are_named_and_nothing_is_lost(client, state, tmp_path: Path) -> None:
    packed = pack(state, "int8_convrot", torch.float32)
    name = "double_blocks.1.txt_mlp.2.weight_scale"
    before = len(client.status().components)
    for value, error, says in (
        (
            torch.full_like(packed.tensors[name], torch.nan),
            BadCheckpoint,
            r"/x\.safetensors: 1 scales of packed weights are not finite",
        ),
        (
            torch.ones(3, 1),
            BadCheckpoint,
            r"has the scale double_blocks\.1\.txt_mlp\.2\.weight_scale of shape \[3, 1\]",
        ),
        (None, BadCheckpoint, "packed as int8_convrot, has no scale"),
    ):
        tensors = packed.tensors | {name: value}
        if value is None:
            del tensors[name]
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(error, match=says) as caught:
            client.lend(tmp_path / "x.safetensors")
        assert name in " ".join(caught.value.names) or value is None
    unknown = packed.tensors | {
        "double_blocks.0.img_mlp.0.comfy_quant": torch.tensor([*b'{"format": "w4a8"}'], dtype=torch.uint8)
    }
    with pytest.raises(Unsupported, match=r"tensor double_blocks\.0\.img_mlp\.0\.comfy_quant: the format 'w4a8'"):
        client.lend(unknown)
    assert len(client.status().components) == before
