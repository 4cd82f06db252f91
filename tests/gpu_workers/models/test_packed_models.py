"""Packed checkpoints, lent as files: the bits of diffusers' class on the weights that they mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
import z_image_models
from packed_checkpoints import FORMATS, Packed, pack, tiled
from text_checkpoints import clip_l_state_dict, t5_state_dict, umt5_state_dict

from xditd.client.arenas import Arena
from xditd.client.demo.checkpoints import flux1_state_dict, flux_vae_state_dict
from xditd.client.lending import describe
from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.models import class_models, registry, resolution
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import Slice
from xditd.gpu_workers.models.operations import Inputs
from xditd.gpu_workers.packed.dequantise import dequantise
from xditd.gpu_workers.packed.embedding import PackedEmbedding
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.packed import PackedWeight
from xditd.ipc.tensors import ComponentKind

if TYPE_CHECKING:
    from one_rank import OneRank

    from xditd.gpu_workers.models.component import Component
    from xditd.gpu_workers.parallel.layouts import ParallelLayout

SMALL = {"heads": 1, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 64}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZE = {"height": 32, "width": 48, "steps": 2}


def lend(rank: OneRank, name: str, source: Any, compute_dtype: str | None = None) -> Component:
    offer = describe(source, compute_dtype=compute_dtype)
    rank._offers.append(offer)
    rank.components.prepare(name, offer.manifest, rank.client)
    return rank.components.plug(name)


def flux1_given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(2, 5, 64, generator=generator),
        "pooled": torch.randn(2, 64, generator=generator),
        "noise": torch.randn(2, 16, 4, 6, generator=generator),
    }


def flux1_expected(meant: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> torch.Tensor:
    return reference.reference_latents(
        reference.transformer_from(meant),
        prompt_embeds=given["prompt_embeds"],
        pooled_prompt_embeds=given["pooled"],
        noise=given["noise"],
        **SIZE,
    )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("packed_format", FORMATS)
def test_flux1_has_the_bits_of_diffusers(
    rank: OneRank, direct: ModuleType, tmp_path: Path, packed_format: str, dtype: str
) -> None:
    packed = pack(flux1_state_dict(0, **SMALL), packed_format, DTYPES[dtype])
    component = lend(rank, "a", packed.save(tmp_path / "x.safetensors"), dtype)
    assert component.model.dtype == DTYPES[dtype]
    given = flux1_given()
    latents = direct.generate(component.model, **given, **SIZE)
    assert latents.dtype == DTYPES[dtype]
    assert torch.equal(latents, flux1_expected(packed.meant, given))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
@pytest.mark.parametrize("packed_format", FORMATS)
def test_z_image_has_the_bits_of_diffusers(
    rank: OneRank, direct: ModuleType, tmp_path: Path, packed_format: str, dtype: str
) -> None:
    """Matrices whose rows a format cannot hold stay plain, or in another format: those of a feed-forward do here."""
    state = z_image_models.state_dict(0, names=z_image_models.COMFYUI)
    packed = pack(state, packed_format, DTYPES[dtype], in_metadata=True)
    component = lend(rank, "a", packed.save(tmp_path / "x.safetensors"), dtype)
    given = {
        name: [each.to(DTYPES[dtype]) for each in value] if isinstance(value, list) else value.to(DTYPES[dtype])
        for name, value in z_image_models.inputs([5, 9], [(4, 6), (4, 6)]).items()
    }
    expected = z_image_models.reference(packed.meant)(**given, return_dict=False)[0]
    [(found,)] = direct.call(component.model, [Inputs(given)])
    assert [torch.equal(mine, its) for mine, its in zip(found, expected, strict=True)] == [True, True]


@pytest.mark.parametrize("packed_format", ["old", "int8_rows", "int8_convrot", "nvfp4", "plain"])
@pytest.mark.parametrize("make", [clip_l_state_dict, t5_state_dict, umt5_state_dict])
def test_text_encoders_compute_in_float32_on_weights_dequantised_into_it(
    rank: OneRank, direct: ModuleType, make: Any, packed_format: str
) -> None:
    packed = pack(make(0), packed_format, torch.float32)
    tokens = torch.arange(2, 14)[None]
    component = lend(rank, "packed", packed.tensors)
    found, _ = direct.encode_text(component.model, tokens)
    assert component.facts.dtype == "float32"
    assert component.facts.scratch_bytes > 0
    expected, _ = direct.encode_text(lend(rank, "plain", packed.meant).model, tokens)
    assert torch.equal(found, expected)
    tables = [name for name, each in component.model.packed_layers.items() if isinstance(each, PackedEmbedding)]
    # Tiles of scales cannot be looked up by rows. In UMT5 both blocks have a table of positions.
    assert len(tables) == (0 if packed_format == "nvfp4" else 3 if make is umt5_state_dict else 2)
    for name in tables:  # they stay as they were lent
        assert (
            component.bindings[name].values.data_ptr()
            == component.tensors[component.match.key_map[name].source].data_ptr()
        )


@pytest.mark.parametrize("packed_format", ["int8_rows", "mxfp8", "plain"])
@pytest.mark.parametrize("make", [clip_l_state_dict, t5_state_dict, umt5_state_dict])
def test_text_encoders_compute_in_float32_on_weights_dequantised_into_another_dtype(
    rank: OneRank, direct: ModuleType, make: Any, packed_format: str
) -> None:
    """As on a plain file of the weights in that dtype."""
    packed = pack(make(0), packed_format, torch.bfloat16)
    tokens = torch.arange(2, 14)[None]
    found, _ = direct.encode_text(lend(rank, "packed", packed.tensors, "bfloat16").model, tokens)
    expected, _ = direct.encode_text(lend(rank, "plain", packed.meant).model, tokens)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_nan_in_the_table_of_a_t5_in_plain_fp8_counts_as_zero(rank: OneRank, direct: ModuleType) -> None:
    packed = pack(t5_state_dict(0), "plain", torch.float32)
    packed.tensors["shared.weight"][5, 3] = torch.nan
    tokens = torch.arange(2, 14)[None]
    found, _ = direct.encode_text(lend(rank, "packed", packed.tensors).model, tokens)
    packed.meant["shared.weight"][5, 3] = 0
    expected, _ = direct.encode_text(lend(rank, "plain", packed.meant).model, tokens)
    assert torch.equal(found, expected)


def test_a_vae_in_plain_fp8_is_dequantised(rank: OneRank, direct: ModuleType) -> None:
    """Nearly all of it is convolutions; its attention has 1x1 convolutions as linear layers."""
    packed = pack(flux_vae_state_dict(0), "plain", torch.bfloat16)
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    component = lend(rank, "packed", packed.tensors)
    found = direct.decode(component.model, latents)
    assert component.model.packed_layers
    assert torch.equal(found, direct.decode(lend(rank, "plain", packed.meant).model, latents))


def test_of_a_file_with_several_components_the_facts_count_the_bytes_of_one(rank: OneRank) -> None:
    parts = {
        "model.diffusion_model.": pack(flux1_state_dict(0, **SMALL), "int8_rows", torch.bfloat16),
        "vae.": pack(flux_vae_state_dict(0), "plain", torch.bfloat16),
    }
    state = {prefix + name: each for prefix, part in parts.items() for name, each in part.tensors.items()}
    for kind, part in zip((ComponentKind.TRANSFORMER, ComponentKind.VAE), parts.values(), strict=True):
        offer = describe(state, kind=kind)
        rank._offers.append(offer)
        rank.components.prepare(kind.value, offer.manifest, rank.client)
        facts = rank.components.plug(kind.value).facts
        read = {name: each for name, each in part.tensors.items() if not name.endswith("comfy_quant")}
        scales = [name.replace(".weight", ".weight_scale") for name in part.weights]
        packed = [each for name, each in read.items() if name in (*part.weights, *scales)]
        assert [*facts.bytes_by_format.values()] == [sum(each.nbytes for each in packed)]
        assert sum(facts.bytes_by_dtype.values()) == sum(each.nbytes for each in read.values())


def test_layers_of_several_formats_and_dtypes_live_in_one_checkpoint(
    rank: OneRank, direct: ModuleType, tmp_path: Path
) -> None:
    """A bias is cast to the dtype of the product, so that one in float32 costs nothing."""
    made = {name: pack(flux1_state_dict(0, **SMALL), name, torch.bfloat16) for name in ("float8", "int8_convrot")}
    whole = Packed()
    for number, name in enumerate(flux1_state_dict(0, **SMALL)):
        source, layer = made["float8" if number % 4 < 2 else "int8_convrot"], name.removesuffix("weight")
        parts = [name] if layer == name else [each for each in source.tensors if each.startswith(layer)]
        whole.tensors |= {each: source.tensors[each] for each in parts if not each.endswith(".bias")}
        whole.meant[name] = source.meant[name]
        if name.endswith(".bias"):
            whole.tensors[name] = whole.meant[name].float()
    component = lend(rank, "a", whole.save(tmp_path / "x.safetensors"))
    assert set(component.facts.bytes_by_format) == {"float8", "int8_convrot"}
    given = flux1_given()
    assert torch.equal(direct.generate(component.model, **given, **SIZE), flux1_expected(whole.meant, given))


@pytest.mark.parametrize("packed_format", FORMATS)
@pytest.mark.parametrize(
    "make",
    [lambda: flux1_state_dict(0, **SMALL), lambda: z_image_models.state_dict(0, names=z_image_models.COMFYUI)],
    ids=["flux1", "z_image"],
)
def test_every_element_is_used_where_the_key_map_puts_it(rank: OneRank, make: Any, packed_format: str) -> None:
    """Every parameter is a slice of what its tensor means, and the packed ones are views of the lent bytes."""
    packed = pack(make(), packed_format, torch.bfloat16)
    component = lend(rank, "a", Arena.copy_of(packed.tensors, "cpu").tensors)
    match = component.match
    assert isinstance(match, CheckpointMatch)
    lent = {block.bytes.untyped_storage().data_ptr() for block in component.opened if block is not None}
    used = dict.fromkeys(packed.meant, 0)
    for target, part in match.key_map.items():
        expected = packed.meant[part.source][part.start : part.stop]
        bound = component.bindings[target]
        used[part.source] += len(expected)
        if isinstance(bound, PackedTensor):
            assert {each.untyped_storage().data_ptr() for each in bound.tensors} <= lent
            bound = dequantise(bound, torch.empty(bound.shape, dtype=torch.bfloat16))
        assert torch.equal(bound, expected.view(bound.shape)), target
    assert used == {name: len(tensor) for name, tensor in packed.meant.items()}
    layers = [target for target, each in component.bindings.items() if isinstance(each, PackedTensor)]
    assert layers == [*match.model.packed_layers]
    assert len(layers) > 20
    assert all(isinstance(each, torch.Tensor) for name, each in component.bindings.items() if name not in layers)


def test_what_is_no_matrix_of_a_layer_is_dequantised_once_and_counted(rank: OneRank) -> None:
    packed = pack(flux1_state_dict(0, **SMALL), "plain", torch.bfloat16)
    component = lend(rank, "a", Arena.copy_of(packed.tensors, "cpu").tensors)
    small = sum(each.numel() for each in packed.meant.values() if each.ndim == 1)
    assert component.copied.host_to_host == 2 * small
    assert component.facts.bytes_by_format == {"float8": sum(each.numel() for each in packed.tensors.values())}
    assert component.facts.dtype == "bfloat16"


def test_a_swap_between_fine_tunes_of_the_same_formats_builds_nothing(
    rank: OneRank, direct: ModuleType, tmp_path: Path
) -> None:
    made = [pack(flux1_state_dict(seed, **SMALL), "int8_convrot", torch.bfloat16) for seed in (1, 2)]
    components = [
        lend(rank, f"c{number}", each.save(tmp_path / f"{number}.safetensors")) for number, each in enumerate(made)
    ]
    cache = rank.components.models
    assert (cache.built, cache.reused) == (1, 1)
    given = flux1_given()
    for number in (0, 1, 0):
        component = rank.components.get(f"c{number}", "transformer")
        found = direct.generate(component.model, **given, **SIZE)
        assert torch.equal(found, flux1_expected(made[number].meant, given))
    assert cache.built == 1
    other = lend(rank, "other", pack(flux1_state_dict(1, **SMALL), "float8", torch.bfloat16).tensors)
    assert cache.built == 2
    assert other.model is not components[0].model


def test_one_scratch_buffer_serves_all_layers_and_is_freed_with_the_last_packed_component(rank: OneRank) -> None:
    scratch = rank.components.models.packed.scratch
    lend(rank, "plain", flux1_state_dict(0, **SMALL))
    assert scratch.size_bytes == 0
    half = lend(rank, "half", pack(flux1_state_dict(0, **SMALL), "int8", torch.bfloat16).tensors)
    largest = max(layer.in_features * layer.out_features for layer in half.model.packed_layers.values())
    assert (scratch.size_bytes, half.facts.scratch_bytes) == (2 * largest, 2 * largest)
    lend(rank, "whole", pack(flux1_state_dict(0, **SMALL), "int8", torch.float32).tensors, "float32")
    assert scratch.size_bytes == 4 * largest
    rank.components.unmap("whole")
    assert scratch.size_bytes
    rank.components.unmap("half")
    assert scratch.size_bytes == 0


def test_a_plug_without_room_for_the_scratch_buffer_holds_no_lent_memory(
    rank: OneRank, direct: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(flux1_state_dict(0, **SMALL), "int8", torch.bfloat16)
    component = lend(rank, "a", packed.save(tmp_path / "x.safetensors"))
    component.model.unplug()

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(rank.components.packed.scratch, "reserve", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            rank.components.get("a", "transformer")
    assert all(each.is_meta for each in component.model.module.parameters())
    given = flux1_given()
    component = rank.components.get("a", "transformer")
    assert torch.equal(direct.generate(component.model, **given, **SIZE), flux1_expected(packed.meant, given))


def test_the_scratch_buffer_stays_for_lent_components_that_are_not_plugged(rank: OneRank) -> None:
    """A job that plugs one must not find that other programs have taken the memory."""
    packed = [pack(flux1_state_dict(seed, **SMALL), "int8", torch.bfloat16) for seed in (1, 2)]
    first, second = (lend(rank, f"c{number}", each.tensors) for number, each in enumerate(packed))
    assert first.model is second.model
    scratch = rank.components.packed.scratch
    size = scratch.size_bytes
    rank.components.unmap("c1")
    assert not first.is_loaded
    assert scratch.size_bytes == size > 0
    with pytest.raises(Unsupported):
        lend(rank, "bad", {"layer.lora_A.weight": torch.ones(2, 2)})
    assert scratch.size_bytes == size
    rank.components.unmap("c0")
    assert scratch.size_bytes == 0


def test_a_module_that_its_cache_has_dropped_frees_the_scratch_buffer(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is lent, but not plugged, when many others are lent after it."""
    from diffusers import FluxTransformer2DModel

    monkeypatch.setattr(class_models, "MAX_MODELS", 1)
    for number, layers in ((0, 1), (1, 1), (2, 2)):
        model = FluxTransformer2DModel(
            num_layers=layers, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, in_channels=4,
            joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        pack(model.state_dict(), "int8", torch.bfloat16).save(folder / "diffusion_pytorch_model.safetensors")
    lent = [lend(rank, str(number), tmp_path / str(number)) for number in (0, 1)]
    assert lent[0].class_model is lent[1].class_model
    assert lent[0].class_model.packed_layers
    rank.components.unmap("1")
    lend(rank, "2", tmp_path / "2")
    for component_id in "02":
        assert rank.components.packed.scratch.size_bytes
        rank.components.unmap(component_id)
    assert rank.components.packed.scratch.size_bytes == 0


def test_a_component_that_is_copied_keeps_its_packed_weights(rank: OneRank, direct: ModuleType, tmp_path: Path) -> None:
    packed = pack(flux1_state_dict(0, **SMALL), "mxfp8", torch.bfloat16)
    component = lend(rank, "a", packed.save(tmp_path / "x.safetensors"))
    rank.components.copy_component("a")
    assert len(rank.components.blocks) == 0
    given = flux1_given()
    assert torch.equal(direct.generate(component.model, **given, **SIZE), flux1_expected(packed.meant, given))


@pytest.fixture
def native_rank(layout: ParallelLayout) -> Iterator[OneRank]:
    """A rank that multiplies natively wherever a format allows it, on the CPU too."""
    import one_rank

    rank = one_rank.OneRank(replace(layout, native_products="always"))
    yield rank
    rank.close()


@pytest.mark.parametrize(
    ("packed_format", "detail"),
    [
        ("int8_convrot", None),
        ("int8", None),
        ("float8", None),
        ("old", None),
        ("old_full", "the file does not allow that the input is rounded"),
        ("plain", "the file does not allow that the input is rounded"),
        ("float8_e5m2", "float8_e5m2 has no native product"),
        ("mxfp8", "mxfp8 has no native product"),
    ],
)
def test_native_products_run_where_they_are_chosen_and_the_file_allows_them(
    native_rank: OneRank, direct: ModuleType, packed_format: str, detail: str | None
) -> None:
    packed = pack(flux1_state_dict(0, **SMALL), packed_format, torch.float32)
    component = lend(native_rank, "a", packed.tensors, "float32")
    given = flux1_given()
    found = direct.generate(component.model, **given, **SIZE)
    right = flux1_expected(packed.meant, given)
    (report,) = native_rank.components.packed.counts.report()
    assert (report.native > 0) is (detail is None)
    assert (report.reference == 0) is (detail is None)
    assert report.why_not_native == ({} if detail is None else {detail: report.reference})
    assert torch.equal(found, right) is (detail is not None)
    assert reference.relative_error(found, right) < 0.1  # the input is rounded to eight bits in every layer


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ({"norm": torch.float16, "bias": torch.float32}, "float16"),
        ({"norm": torch.float32, "bias": torch.bfloat16}, "bfloat16"),
        ({"norm": torch.float32, "bias": torch.float32}, "bfloat16"),
    ],
)
def test_the_compute_dtype_is_that_of_most_plain_weights(rank: OneRank, plain: Any, expected: str) -> None:
    packed = pack(flux1_state_dict(0, **SMALL), "float8", torch.float32)
    for name in packed.tensors:
        for part, dtype in plain.items():
            if part in name and name not in packed.weights and packed.tensors[name].ndim == 1:
                packed.tensors[name] = packed.tensors[name].to(dtype)
    assert lend(rank, "a", packed.tensors).facts.dtype == expected
    assert lend(rank, "b", packed.tensors, "float32").facts.dtype == "float32"


@pytest.mark.parametrize(
    ("packed_format", "part", "value", "says"),
    [
        ("float8", "weight_scale", float("nan"), "not finite"),
        ("float8", "input_scale", 0.0, "not positive"),
        ("int8_convrot", "weight_scale", float("inf"), "not finite"),
        ("nvfp4", "weight_scale_2", float("-inf"), "not finite"),
        ("nvfp4", "weight_scale", float("nan"), "not finite"),
        ("mxfp8", "weight_scale", 0xFF, "not finite"),
    ],
)
def test_scales_that_are_not_numbers_are_named(
    rank: OneRank, packed_format: str, part: str, value: float, says: str
) -> None:
    tensors = pack(flux1_state_dict(0, **SMALL), packed_format, torch.bfloat16).tensors
    name = f"double_blocks.0.img_mlp.0.{part}"
    tensors[name].view(-1)[0] = value
    with pytest.raises(BadCheckpoint, match=says) as caught:
        lend(rank, "a", tensors)
    assert caught.value.names == (name,)
    assert len(rank.components.blocks) == 0
    assert rank.components.models.packed.scratch.size_bytes == 0
    tensors[name].view(-1)[0] = 1.0 if packed_format != "mxfp8" else 127
    lend(rank, "a", tensors)


@pytest.mark.parametrize(("packed_format", "shared_by"), [("mxfp8", 32), ("nvfp4", 16)])
def test_what_pads_tiles_of_scales_may_be_anything(rank: OneRank, packed_format: str, shared_by: int) -> None:
    packed = pack(flux1_state_dict(0, **SMALL | {"context_dim": 32}), packed_format, torch.bfloat16)
    meant = packed.meant["txt_in.weight"]
    padding = tiled(torch.ones(len(meant), 32 // shared_by, dtype=torch.uint8)) == 0
    assert padding.any()
    packed.tensors["txt_in.weight_scale"].view(torch.uint8)[padding] = 0xFF
    bound = lend(rank, "a", packed.tensors).bindings["context_embedder.weight"]
    assert isinstance(bound, PackedTensor)
    assert torch.equal(dequantise(bound, torch.empty_like(meant)), meant)


def test_rows_inside_a_tile_of_scales_are_refused_by_name() -> None:
    """A hidden size that is no multiple of 128: no published model with fused projections has one."""
    packed = {"qkv.weight": PackedWeight("qkv.weight", "nvfp4", (192, 64), "s", "t")}
    key_map = {"q": Slice("qkv.weight", 0, 64), "k": Slice("qkv.weight", 64, 192)}
    with pytest.raises(Unsupported, match=r"inside a tile: qkv\.weight \(nvfp4\) at row 64, qkv\.weight"):
        resolution._check_slices(registry.families()[0], key_map, packed)
    resolution._check_slices(registry.families()[0], {"q": Slice("qkv.weight", 0, 128)}, packed)
