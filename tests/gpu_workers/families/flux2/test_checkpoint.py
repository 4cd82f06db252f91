"""The FLUX.2 family: recognition, configuration, key maps against diffusers' converter, and every refusal."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import flux2_models
import pytest
import torch

from xditd.gpu_workers.families.flux2.checkpoint import Flux2
from xditd.gpu_workers.families.flux2.config import Flux2Config
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.lora_targets import targets_of
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.ipc.errors import BadCheckpoint, Unsupported

Infos = dict[str, TensorInfo]
PREFIX = "model.diffusion_model."
SMALL = flux2_models.DEV
FULL = {
    "dev": Flux2Config(6144, 8, 48, 15360, has_guidance=True),
    "klein 9B": Flux2Config(4096, 8, 24, 12288, has_guidance=False),
    "klein 4B": Flux2Config(3072, 5, 20, 7680, has_guidance=False),
}
BILLIONS = {"dev": 32.22, "klein 9B": 9.08, "klein 4B": 3.88}
LAYOUTS = [True, False]
NAMES = ["original", "diffusers"]


def infos(config: Flux2Config = SMALL, prefix: str = "") -> Infos:
    return {prefix + entry.source: TensorInfo("bfloat16", entry.shape) for entry in Flux2().entries(config, ())}


def fitted(given: Infos) -> Resolution:
    return resolve(detect(given.keys()), given)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("is_original", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("config", [SMALL, *FULL.values(), replace(SMALL, double_blocks=1)])
def test_each_layout_is_recognised_as_its_configuration(config: Flux2Config, is_original: bool, prefix: str) -> None:
    config = replace(config, is_original=is_original)
    given = infos(config, prefix)
    found = fitted(given)
    assert found.family.name == "flux2"
    assert found.config == config
    assert {part.source for part in found.key_map.values()} == set(given)


@pytest.mark.parametrize("model", list(FULL))
def test_full_sizes_have_the_known_counts(model: str) -> None:
    from diffusers import Flux2Transformer2DModel

    config = FULL[model]
    with torch.device("meta"):
        module = Flux2Transformer2DModel(
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            num_attention_heads=config.heads,
            joint_attention_dim=config.context_channels,
            guidance_embeds=config.has_guidance,
        )
    elements = sum(torch.Size(info.shape).numel() for info in infos(config).values())
    assert elements == sum(each.numel() for each in module.parameters())
    assert round(elements / 1e9, 2) == BILLIONS[model]
    check_targets(
        Flux2(), Flux2().entries(config, ()), {name: tuple(each.shape) for name, each in module.named_parameters()}
    )


@pytest.mark.parametrize("config", [flux2_models.DEV, flux2_models.KLEIN], ids=["dev", "klein"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_key_map_equals_diffusers_converter_for_every_element(config: Flux2Config, prefix: str) -> None:
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    generator = torch.Generator().manual_seed(0)
    # Random bits, compared as bits: every element differs from its neighbours, and nothing is rounded.
    state = {
        prefix + entry.source: torch.empty(entry.shape, dtype=torch.int16).random_(generator=generator)
        for entry in Flux2().entries(config, ())
    }
    found = fitted({name: TensorInfo("bfloat16", tuple(tensor.shape)) for name, tensor in state.items()})
    expected = convert_flux2_transformer_checkpoint_to_diffusers(
        {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    )
    assert expected.keys() == found.key_map.keys()
    for target, part in found.key_map.items():
        ours = state[part.source][part.start : part.stop]
        right = expected[target]
        if target == "norm_out.linear.weight":  # the module reads it in the file's order
            right = torch.cat(right.chunk(2)[::-1])
        assert torch.equal(ours, right), target


def test_norms_may_be_named_as_in_newer_modules_of_comfyui() -> None:
    given = {name.replace("_norm.scale", "_norm.weight"): info for name, info in infos(prefix=PREFIX).items()}
    found = fitted(given)
    assert found.config == SMALL
    assert {part.source for part in found.key_map.values()} == set(given)


def test_diffusers_layout_is_the_class_s_own_state_dict() -> None:
    module = flux2_models.reference(flux2_models.state_dict(0))
    given = {name: TensorInfo.of(tensor) for name, tensor in module.state_dict().items()}
    found = fitted(given)
    assert found.config == replace(SMALL, is_original=False)
    assert {target: part.source for target, part in found.key_map.items()} == {name: name for name in given}


@pytest.mark.parametrize("is_original", LAYOUTS, ids=NAMES)
def test_every_element_is_used_once(is_original: bool) -> None:
    given = infos(replace(SMALL, is_original=is_original))
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for part in fitted(given).key_map.values():
        rows[part.source].append((part.start, part.stop))
    assert rows.keys() == given.keys()
    for name, ranges in rows.items():
        ranges.sort()
        assert ranges[0][0] == 0
        assert ranges[-1][1] == given[name].shape[0]
        assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))


@pytest.mark.parametrize("is_original", LAYOUTS, ids=NAMES)
def test_faults_are_named_as_the_file_spells_them(is_original: bool) -> None:
    given = infos(replace(SMALL, is_original=is_original), PREFIX)
    projection = "double_blocks.1.img_attn.proj.weight" if is_original else "transformer_blocks.1.attn.to_out.0.weight"
    wide = (
        "single_blocks.0.linear1.weight" if is_original else "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
    )
    del given[PREFIX + projection]
    given[f"{PREFIX}img_mod.lin.weight"] = TensorInfo("bfloat16", (1,))
    given[PREFIX + wide] = TensorInfo("bfloat16", (512, 256))
    with pytest.raises(BadCheckpoint) as caught:
        fitted(given)
    assert f"1 missing: {PREFIX}{projection}" in caught.value.detail
    assert f"1 unexpected: {PREFIX}img_mod.lin.weight" in caught.value.detail
    assert f"{PREFIX}{wide} is [512, 256], expected [2304, 256]" in caught.value.detail


@pytest.mark.parametrize("victim", ["img_in.weight", "txt_in.weight", "single_blocks.1.linear2.weight"])
def test_one_misshapen_tensor_does_not_bend_the_configuration(victim: str) -> None:
    given = infos()
    given[victim] = TensorInfo("bfloat16", (512, given[victim].shape[1]))
    with pytest.raises(BadCheckpoint, match="1 wrongly shaped") as caught:
        fitted(given)
    assert f"{victim} is [512, " in caught.value.detail


def test_lost_blocks_are_named() -> None:
    lost = {name: info for name, info in infos().items() if not name.startswith("double_blocks.0.")}
    with pytest.raises(BadCheckpoint, match=r"missing: double_blocks\.0\."):
        fitted(lost)
    none = {name: info for name, info in infos().items() if not name.startswith("single_blocks.")}
    with pytest.raises(BadCheckpoint, match=r"no tensor of single_blocks\.0"):
        fitted(none)
    with pytest.raises(BadCheckpoint, match=r"single_blocks\.256 exceeds the limit of 256 blocks"):
        fitted({**infos(), "single_blocks.256.linear2.weight": TensorInfo("bfloat16", (256, 1024))})


def test_tensors_of_flux1_are_unexpected() -> None:
    given = infos() | {"double_blocks.0.img_mod.lin.weight": TensorInfo("bfloat16", (1536, 256))}
    with pytest.raises(BadCheckpoint, match=r"1 unexpected: double_blocks\.0\.img_mod\.lin\.weight"):
        fitted(given)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"img_in.weight": (256, 192), "final_layer.linear.weight": (192, 256)}, "img_in takes 192 channels, not 128"),
        ({f"double_blocks.{i}.img_attn.norm.query_norm.scale": (64,) for i in range(2)}, "256 channels in heads of 64"),
    ],
)
def test_variants_are_refused_by_name(more: dict[str, tuple[int, ...]], says: str) -> None:
    given = infos(SMALL, PREFIX) | {PREFIX + name: TensorInfo("bfloat16", shape) for name, shape in more.items()}
    with pytest.raises(Unsupported, match=says) as caught:
        fitted(given)
    assert "lend FLUX.2-dev, FLUX.2-klein or a fine-tune of them" in caught.value.detail


@pytest.mark.parametrize("is_original", LAYOUTS, ids=NAMES)
def test_loras_name_the_last_modulation_in_the_order_that_they_mean(is_original: bool) -> None:
    config = replace(SMALL, is_original=is_original)
    found = targets_of(Flux2(), config)
    moved = [(part.start, part.stop, part.at) for part in found["norm_out_linear"].parts]
    # diffusers' layer gives scale first; the module of an original file gives shift first.
    assert moved == ([(0, 256, 256), (256, 512, 0)] if is_original else [(0, 512, 0)])
    assert ("final_layer_adaLN_modulation_1" in found) == is_original
    qkv = [(part.layer, part.start, part.stop) for part in found["double_blocks_1_txt_attn_qkv"].parts]
    parts = ("add_q_proj", "add_k_proj", "add_v_proj")
    assert qkv == [(f"transformer_blocks.1.attn.{part}", 256 * i, 256 * i + 256) for i, part in enumerate(parts)]
    assert found["single_transformer_blocks_0_attn_to_out"] == found["single_blocks_0_linear2"]
