"""Packed checkpoints of Qwen-Image and LoRAs beside it: what diffusers' class gives on the weights that are meant."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lora_files
import pytest
import qwen_image_models
import torch
from packed_checkpoints import pack

from xditd.client.lending import describe
from xditd.client.loras.lending import describe_lora
from xditd.gpu_workers.models.operations import CallOptions, Inputs
from xditd.ipc.job_parts import LoraUse

if TYPE_CHECKING:
    from one_rank import OneRank

EDIT_2511 = qwen_image_models.EDIT_2511
PREFIX = "model.diffusion_model."


def lend(rank: OneRank, name: str, offer: Any) -> Any:
    rank._offers.append(offer)
    rank.components.prepare(name, offer.manifest, rank.client)
    return rank.components.plug(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed_format", ["float8", "int8_convrot", "old", "nvfp4"])
def test_packed_weights_have_the_bits_of_the_class(
    rank: OneRank, direct: ModuleType, tmp_path: Path, packed_format: str, dtype: str
) -> None:
    kind = getattr(torch, dtype)
    state = qwen_image_models.state_dict(0, EDIT_2511, prefix=PREFIX)
    packed = pack(state, packed_format, kind, prefix=PREFIX)
    assert any("attn.to_q" in name for name in packed.weights)
    component = lend(rank, "a", describe(packed.save(tmp_path / "x.safetensors"), compute_dtype=dtype))
    assert component.model.config.has_marker
    given = {
        name: each.to(kind) if isinstance(each, torch.Tensor) and name != "encoder_hidden_states_mask" else each
        for name, each in qwen_image_models.inputs(2, 9, (4, 6), ((3, 5),), (9, 4)).items()
    }
    meant = {name.removeprefix(PREFIX): each for name, each in packed.meant.items()}
    with torch.no_grad():
        (expected,) = qwen_image_models.reference(meant, EDIT_2511)(**given, return_dict=False)
    [(found,)] = direct.call(component.model, [Inputs(given)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("packed_format", [None, "int8_rows"])
def test_a_lora_is_as_if_it_were_in_the_weights(rank: OneRank, direct: ModuleType, packed_format: str | None) -> None:
    plain = qwen_image_models.state_dict(0)
    packed = None if packed_format is None else pack(plain, packed_format, torch.float32)
    source, meant = (plain, plain) if packed is None else (packed.tensors, packed.meant)
    lora = lora_files.make(lora_files.matrices(plain), "comfyui", 3, size=0.2)
    component = lend(rank, "base", describe(source, compute_dtype="float32" if packed else None))
    lend(rank, "lora", describe_lora(lora.tensors))
    variant = rank.components.variant(component, [LoraUse(component_id="lora", strength=0.6)])
    given = qwen_image_models.inputs(2, 9, (4, 6), (), (9, 4))
    with variant.switched_on():
        operations, options = component.model.operations, CallOptions(loras=variant.begin_step())
        found = operations.run(component.model, Inputs(given), options)
    [(alone,)] = direct.call(component.model, [Inputs(given)])
    with torch.no_grad():
        (right,) = qwen_image_models.reference(lora.baked_into(meant, 0.6))(**given, return_dict=False)
        (without,) = qwen_image_models.reference(meant)(**given, return_dict=False)
    assert qwen_image_models.relative_error(found, right) <= 2e-6
    assert torch.equal(alone, without)
    assert qwen_image_models.relative_error(alone, right) > 0.05
