"""The Z-Image family: recognition, configuration, key maps against diffusers' converter, and every refusal."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import z_image_models

from xditd.gpu_workers.families.z_image.checkpoint import ZImage
from xditd.gpu_workers.families.z_image.config import ZImageConfig
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.ipc.errors import BadCheckpoint, UnknownFamily, Unsupported

Infos = dict[str, TensorInfo]
PREFIX = "model.diffusion_model."
COMFYUI = ("layers.0.attention.qkv.weight",)
FULL = ZImageConfig(hidden=3840, layers=30, refiners=2, text_channels=2560)
SMALL = ZImageConfig(hidden=256, layers=2, refiners=2, text_channels=64)


def infos(config: ZImageConfig = SMALL, names: tuple[str, ...] = (), prefix: str = "") -> Infos:
    return {prefix + entry.source: TensorInfo("bfloat16", entry.shape) for entry in ZImage().entries(config, names)}


def fitted(infos: Infos) -> Resolution:
    return resolve(detect(infos.keys()), infos)


@pytest.mark.parametrize("prefix", ["", PREFIX, "transformer."])
@pytest.mark.parametrize("names", [(), COMFYUI], ids=["diffusers", "comfyui"])
@pytest.mark.parametrize("config", [SMALL, FULL, replace(SMALL, layers=1, refiners=1)], ids=["small", "full", "one"])
def test_each_layout_is_recognised_as_one_configuration(config: ZImageConfig, names: tuple[str], prefix: str) -> None:
    given = infos(config, names, prefix)
    found = fitted(given)
    assert found.family.name == "z_image"
    assert found.config == config
    assert {part.source for part in found.key_map.values()} == set(given)


def test_full_size_has_the_known_counts() -> None:
    given = infos(FULL)
    assert len(given) == 521
    assert FULL.heads == 30
    assert FULL.mlp == 10_240
    fused = infos(FULL, COMFYUI)
    assert len(given) - len(fused) == 2 * 34
    sizes = [sum(torch.Size(info.shape).numel() for info in each.values()) for each in (given, fused)]
    assert sizes == [6_154_908_736] * 2


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_key_map_equals_diffusers_converter_for_every_element(prefix: str) -> None:
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    generator = torch.Generator().manual_seed(0)
    # Random bits, compared as bits: every element differs from its neighbours, and nothing is rounded.
    state = {
        prefix + entry.source: torch.empty(entry.shape, dtype=torch.int16).random_(generator=generator)
        for entry in ZImage().entries(SMALL, COMFYUI)
    } | {f"{prefix}norm_final.weight": torch.ones(SMALL.hidden, dtype=torch.int16)}
    found = fitted({name: TensorInfo("bfloat16", tuple(tensor.shape)) for name, tensor in state.items()})
    assert found.config == SMALL
    assert found.skipped == (f"{prefix}norm_final.weight",)
    expected = convert_z_image_transformer_checkpoint_to_diffusers(dict(state))
    assert expected.keys() == found.key_map.keys()
    for target, part in found.key_map.items():
        ours = state[part.source][part.start : part.stop]
        assert torch.equal(ours.view(part.shape or ours.shape), expected[target]), target


def test_diffusers_layout_is_the_class_s_own_state_dict() -> None:
    module = z_image_models.reference(z_image_models.state_dict(0))
    given = {name: TensorInfo.of(tensor) for name, tensor in module.state_dict().items()}
    found = fitted(given)
    assert found.config == SMALL
    assert {target: part.source for target, part in found.key_map.items()} == {name: name for name in given}


@pytest.mark.parametrize("names", [(), COMFYUI], ids=["diffusers", "comfyui"])
def test_every_element_is_used_once_and_every_parameter_is_filled(names: tuple[str]) -> None:
    given = infos(SMALL, names)
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for part in fitted(given).key_map.values():
        rows[part.source].append((part.start, part.stop))
    assert rows.keys() == given.keys()
    for name, ranges in rows.items():
        ranges.sort()
        assert ranges[0][0] == 0
        assert ranges[-1][1] == given[name].shape[0]
        assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))
    module = z_image_models.reference(z_image_models.state_dict(0))
    parameters = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    check_targets(ZImage(), ZImage().entries(SMALL, names), parameters)


@pytest.mark.parametrize("names", [(), COMFYUI], ids=["diffusers", "comfyui"])
def test_faults_are_named_as_the_file_spells_them(names: tuple[str]) -> None:
    given = infos(SMALL, names, PREFIX)
    projection = "layers.1.attention.out.weight" if names else "layers.1.attention.to_out.0.weight"
    del given[PREFIX + projection]
    given[f"{PREFIX}layers.0.extra"] = TensorInfo("bfloat16", (1,))
    given[f"{PREFIX}t_embedder.mlp.0.bias"] = TensorInfo("bfloat16", (512,))
    with pytest.raises(BadCheckpoint) as caught:
        fitted(given)
    assert f"1 missing: {PREFIX}{projection}" in caught.value.detail
    assert f"1 unexpected: {PREFIX}layers.0.extra" in caught.value.detail
    assert "t_embedder.mlp.0.bias is [512], expected [1024]" in caught.value.detail


@pytest.mark.parametrize(
    "victim", ["x_embedder.weight", "cap_embedder.1.weight", "layers.1.attention.out.weight", "x_pad_token"]
)
def test_one_misshapen_tensor_does_not_bend_the_configuration(victim: str) -> None:
    given = infos(SMALL, COMFYUI)
    given[victim] = TensorInfo("bfloat16", (512, given[victim].shape[1]))
    with pytest.raises(BadCheckpoint, match="1 wrongly shaped") as caught:
        fitted(given)
    assert f"{victim} is [512, " in caught.value.detail


def test_a_lost_block_is_missing() -> None:
    given = {name: info for name, info in infos().items() if not name.startswith("context_refiner.1.")}
    with pytest.raises(BadCheckpoint, match=r"missing: context_refiner\.1\."):
        fitted(given)
    none = {name: info for name, info in infos().items() if "_refiner." not in name}
    with pytest.raises(BadCheckpoint, match=r"no tensor of noise_refiner\.0"):
        fitted(none)
    with pytest.raises(BadCheckpoint, match=r"layers\.256 exceeds the limit of 256 blocks"):
        fitted({**infos(), "layers.256.attention.to_q.weight": TensorInfo("bfloat16", (256, 256))})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"siglip_embedder.1.weight": (256, 1152)}, "Omni and Edit, which take images through SigLIP"),
        ({"dec_net.cond_embed.weight": (256, 256)}, "in pixel space"),
        ({"control_layers.0.before_proj.weight": (256, 256)}, "ControlNets of Z-Image"),
        ({"clip_text_pooled_proj.0.weight": (1024,)}, "relatives of Z-Image with pooled text"),
        ({f"{kind}.attention.qkv.weight": (512, 256) for kind in ("layers.0", "layers.1")}, "grouped-query attention"),
        (
            {f"{kind}.attention.q_norm.weight": (64,) for kind in ("layers.0", "layers.1", "noise_refiner.0")},
            "256 channels in heads of 64",
        ),
        ({"x_embedder.weight": (256, 768)}, "takes 768 channels, not 64"),
    ],
)
def test_variants_are_refused_by_name(more: dict[str, tuple[int, ...]], says: str) -> None:
    given = infos(SMALL, COMFYUI, PREFIX) | {
        PREFIX + name: TensorInfo("bfloat16", shape) for name, shape in more.items()
    }
    with pytest.raises(Unsupported, match=says) as caught:
        fitted(given)
    assert "lend Z-Image-Turbo, Z-Image or a fine-tune of them" in caught.value.detail


def test_relatives_are_not_claimed() -> None:
    lumina = {
        "cap_embedder.0.weight": TensorInfo("bfloat16", (2304,)),
        "layers.0.adaLN_modulation.1.weight": TensorInfo("bfloat16", (9216, 1024)),
        "noise_refiner.0.attention.qkv.weight": TensorInfo("bfloat16", (3840, 2304)),
    }
    with pytest.raises(UnknownFamily):
        detect(lumina.keys())
    with pytest.raises(UnknownFamily):
        detect(["control_layers.0.adaLN_modulation.0.weight", "control_all_x_embedder.2-1.weight"])
