"""GGUF checkpoints, lent as files: the bits of diffusers' class on the numbers that their blocks mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
import z_image_models
from gguf_files import SCALES, dequantise, write_model, write_t5
from text_checkpoints import t5_state_dict, umt5_state_dict

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.client.lending import describe
from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.families.z_image.config import ZImageConfig
from xditd.gpu_workers.models.operations import Inputs
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.packed import GGUF_BLOCKS
from xditd.ipc.tensors import Tier

if TYPE_CHECKING:
    from one_rank import OneRank

    from xditd.gpu_workers.models.component import Component

State = dict[str, torch.Tensor]
Packed = Mapping[str, tuple[str, torch.Tensor]]

SIZE = {"height": 32, "width": 48, "steps": 2}
FLUX1 = {"heads": 2, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 64}
Z_IMAGE = ZImageConfig(hidden=768, layers=1, refiners=1, text_channels=64)
"""The narrowest of which all matrices have rows of multiples of 256."""
BAR = 5e-2
"""Relative error to the class all in bfloat16, after two steps. Rounding its float32 weights alone gives 1.1e-2."""


def lend(rank: OneRank, path: Path, compute_dtype: str | None = None) -> Component:
    offer = describe(path, compute_dtype=compute_dtype)
    rank._offers.append(offer)
    assert offer.copied.total == 0
    assert offer.manifest.tiers == (Tier.FILE,)
    rank.components.prepare("a", offer.manifest, rank.client)
    return rank.components.plug("a")


def meant(state: State, packed: Packed, dtype: torch.dtype) -> State:
    """The plain checkpoint that a packed one means, by the ``gguf`` package where it can be imported."""
    return {name: numbers(*packed[name], dtype) if name in packed else plain for name, plain in state.items()}


def numbers(kind: str, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    try:
        import gguf
    except ImportError:
        return dequantise(blocks, kind, dtype)  # compared with recorded numbers in tests of its own
    found = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(found).to(dtype)


def in_blocks(kind: str) -> Any:
    """Choose the matrices that converters pack; the others stay as precise as they were."""
    return lambda name: kind if name.startswith(("double_blocks.", "single_blocks.", "layers.")) else None


def mixed(name: str) -> str | None:
    """Choose types as the mixtures of llama.cpp do (Q4_K_M): some layers with more bits, in one file."""
    return (
        {"linear2": "q6_k", "img_attn.qkv": "q5_k", "txt_mlp.0": "q8_0", "img_mlp.2": None}.get(
            name.removesuffix(".weight").split(".", 2)[-1], "q4_k"
        )
        if name.startswith(("double_blocks.", "single_blocks."))
        else None
    )


def flux1_given() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(2, 5, 64, generator=generator),
        "pooled": torch.randn(2, 64, generator=generator),
        "noise": torch.randn(2, 16, 4, 6, generator=generator),
    }


def flux1_expected(state: State, given: State) -> torch.Tensor:
    return reference.reference_latents(
        reference.transformer_from(state),
        prompt_embeds=given["prompt_embeds"],
        pooled_prompt_embeds=given["pooled"],
        noise=given["noise"],
        **SIZE,
    )


@pytest.mark.parametrize("kind", [*GGUF_BLOCKS, "mixed"])
def test_flux1_has_the_bits_of_diffusers(rank: OneRank, direct: ModuleType, tmp_path: Path, kind: str) -> None:
    state = flux1_state_dict(0, **FLUX1, dtype=torch.bfloat16)
    packed = write_model(tmp_path / "x.gguf", state, mixed if kind == "mixed" else in_blocks(kind), "flux")
    assert len(packed) >= 9
    component = lend(rank, tmp_path / "x.gguf")
    assert component.model.dtype == torch.bfloat16
    assert set(component.facts.bytes_by_format) == {kind for kind, _ in packed.values()}
    assert sum(component.facts.bytes_by_format.values()) == sum(blocks.numel() for _, blocks in packed.values())
    given = flux1_given()
    latents = direct.generate(component.model, **given, **SIZE)
    assert torch.equal(latents, flux1_expected(meant(state, packed, torch.bfloat16), given))


def test_flux1_in_float32_has_the_bits_of_diffusers(rank: OneRank, direct: ModuleType, tmp_path: Path) -> None:
    state = flux1_state_dict(0, **FLUX1)
    packed = write_model(tmp_path / "x.gguf", state, mixed, "flux")
    component = lend(rank, tmp_path / "x.gguf", "float32")
    given = flux1_given()
    latents = direct.generate(component.model, **given, **SIZE)
    assert torch.equal(latents, flux1_expected(meant(state, packed, torch.float32), given))


def test_what_converters_keep_in_float32_does_not_widen_packed_layers(
    rank: OneRank, direct: ModuleType, tmp_path: Path
) -> None:
    """Biases, norms and the first layers stay float32 in most files, and the packed layers run in bfloat16."""
    state = flux1_state_dict(0, **FLUX1)
    packed = write_model(tmp_path / "x.gguf", state, in_blocks("q8_0"), "flux")
    component = lend(rank, tmp_path / "x.gguf")
    assert {component.match.dtypes[name] for name in component.match.packed} == {torch.bfloat16}
    given = flux1_given()
    latents = direct.generate(component.model, **given, **SIZE)
    in_halves = {name: each.bfloat16() for name, each in meant(state, packed, torch.bfloat16).items()}
    expected = flux1_expected(in_halves, given)
    assert reference.relative_error(latents, expected) < BAR


def test_slices_of_packed_weights_are_views_of_the_file(rank: OneRank, tmp_path: Path) -> None:
    state = flux1_state_dict(0, **FLUX1, dtype=torch.bfloat16)
    packed = write_model(tmp_path / "x.gguf", state, in_blocks("q4_k"), "flux", alignment=64)
    component = lend(rank, tmp_path / "x.gguf")
    assert component.copies == []
    found = {target: each for target, each in component.bindings.items() if isinstance(each, PackedTensor)}
    whole = {name: blocks.shape for name, (_, blocks) in packed.items()}
    assert len(found) > len(whole)  # query, key and value are one tensor in the file
    rows = {name: 0 for name in whole}
    for target, each in found.items():
        part = component.match.key_map[target]
        source = component.tensors[part.source]
        assert each.values.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        assert each.values.data_ptr() == source.data_ptr() + part.start * source.shape[1]
        assert torch.equal(each.values, packed[part.source][1][part.start : part.stop])
        rows[part.source] += part.stop - part.start
    assert rows == {name: shape[0] for name, shape in whole.items()}


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_z_image_has_the_bits_of_diffusers(rank: OneRank, direct: ModuleType, tmp_path: Path, kind: str) -> None:
    """In the names of ComfyUI's files, and with pad tokens of one dimension, as ggml's tools leave them."""
    state = z_image_models.state_dict(0, Z_IMAGE, names=z_image_models.COMFYUI, dtype=torch.bfloat16)
    written = {name: tensor[0] if name.endswith("pad_token") else tensor for name, tensor in state.items()}
    packed = write_model(tmp_path / "x.gguf", written, in_blocks(kind), "lumina2")
    assert len(packed) >= 6
    component = lend(rank, tmp_path / "x.gguf")
    module = z_image_models.reference(meant(state, packed, torch.bfloat16), Z_IMAGE)
    given = z_image_models.inputs((20, 90), ((8, 12), (4, 4)))
    given = {
        name: value.bfloat16() if name == "t" else [each.bfloat16() for each in value] for name, value in given.items()
    }
    ((found,),) = direct.call(component.model, [Inputs(given)])
    with torch.no_grad():
        expected = module(**given, return_dict=False)[0]
    assert len(found) == len(expected) == 2
    assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["q8_0", "q6_k"])
def test_a_scale_that_is_not_finite_is_refused(rank: OneRank, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    packed = write_model(path, flux1_state_dict(0, **FLUX1, dtype=torch.bfloat16), in_blocks(kind), "flux")
    name = "single_blocks.0.linear1.weight"
    content, blocks = path.read_bytes(), packed[name][1].numpy().tobytes()
    spoilt = bytearray(blocks)
    at = 5 * GGUF_BLOCKS[kind].size_bytes + SCALES[kind][0]
    spoilt[at : at + 2] = b"\x00\x7e"
    path.write_bytes(content.replace(blocks, bytes(spoilt)))
    with pytest.raises(BadCheckpoint, match=f"x: 1 scales of packed weights are not finite.*{name}"):
        lend(rank, path)
    path.write_bytes(content)
    lend(rank, path)


@pytest.mark.parametrize(("family", "kind"), [("t5", "q8_0"), ("t5", "q4_k"), ("umt5", "q8_0")])
def test_a_t5_in_the_names_of_llama_cpp_has_the_result_of_a_plain_one(
    rank: OneRank, direct: ModuleType, tmp_path: Path, family: str, kind: str
) -> None:
    """It computes in float32 on the numbers that its blocks mean; its table stays in blocks."""
    make = {"t5": t5_state_dict, "umt5": umt5_state_dict}[family]
    state = make(0, width=256, inner=512, heads=4, vocabulary=300)
    packed = write_t5(tmp_path / "t5.gguf", state, kind)
    plain = [name for name, each in state.items() if each.ndim == 2 and not name.endswith("attention_bias.weight")]
    assert len(packed) == len(plain)
    component = lend(rank, tmp_path / "t5.gguf")
    assert component.facts.family == family
    assert component.facts.dtype == "float32"
    assert component.bindings["shared.weight"].format == kind  # type: ignore[union-attr]
    tokens = torch.tensor([[2, 3, 299, 5, 5, 0]])
    found, _ = direct.encode_text(component.model, tokens)
    rank.components.unmap("a")
    rank.lend("b", meant(state, packed, torch.float32))
    expected, _ = direct.encode_text(rank.components.get("b", "text_encoder").model, tokens)
    assert torch.equal(found, expected)
