"""The Wan family: recognition, configuration, key maps against diffusers' converter, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import wan_models
from wan_models import family_of

from xditd.gpu_workers.families.wan.checkpoint import Wan, WanVace
from xditd.gpu_workers.families.wan.config import WanConfig, WanVaceConfig
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.lora_targets import targets_of
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.ipc.errors import BadCheckpoint, Unsupported

Infos = dict[str, TensorInfo]
PREFIX = "model.diffusion_model."
FULL = {
    "t2v 1.3B": WanConfig(1536, 30, 8960),
    "t2v 14B": WanConfig(5120, 40, 13824),
    "i2v 14B, 2.1": WanConfig(5120, 40, 13824, in_channels=36, image_channels=1280),
    "i2v A14B, 2.2": WanConfig(5120, 40, 13824, in_channels=36),
    "i2v 14B, two images": WanConfig(5120, 40, 13824, in_channels=36, image_channels=1280, has_image_positions=True),
    "TI2V 5B": WanConfig(3072, 30, 14336, in_channels=48, out_channels=48),
    "VACE 1.3B": WanVaceConfig(1536, 30, 8960, control_blocks=15),
    "VACE 14B": WanVaceConfig(5120, 40, 13824, control_blocks=8),
}
BILLIONS = {
    "t2v 1.3B": 1.42,
    "t2v 14B": 14.29,
    "i2v 14B, 2.1": 16.39,
    "i2v A14B, 2.2": 14.29,
    "i2v 14B, two images": 16.40,
    "TI2V 5B": 5.00,
    "VACE 1.3B": 2.15,
    "VACE 14B": 17.34,
}
LAYOUTS = [True, False]
NAMES = ["original", "diffusers"]


def infos(config: WanConfig = wan_models.TEXT, prefix: str = "") -> Infos:
    return {
        prefix + entry.source: TensorInfo("bfloat16", entry.shape) for entry in family_of(config).entries(config, ())
    }


def fitted(given: Infos) -> Resolution:
    return resolve(detect(given.keys()), given)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("is_original", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("config", [*wan_models.CONFIGS.values(), *FULL.values()])
def test_each_layout_is_recognised_as_its_configuration(config: WanConfig, is_original: bool, prefix: str) -> None:
    config = replace(config, is_original=is_original)
    given = infos(config, prefix)
    found = fitted(given)
    assert found.family.name == ("wan_vace" if isinstance(config, WanVaceConfig) else "wan")
    assert found.config == config
    assert {part.source for part in found.key_map.values()} == set(given)


@pytest.mark.parametrize("model", list(FULL))
def test_full_sizes_have_the_known_counts(model: str) -> None:
    config = FULL[model]
    with torch.device("meta"):
        module = wan_models.empty_reference(config)
    elements = sum(torch.Size(info.shape).numel() for info in infos(config).values())
    assert elements == sum(each.numel() for each in module.parameters())
    assert round(elements / 1e9, 2) == BILLIONS[model]
    check_targets(
        Wan(), family_of(config).entries(config, ()), {name: tuple(p.shape) for name, p in module.named_parameters()}
    )


@pytest.mark.parametrize("config", list(wan_models.CONFIGS.values()), ids=list(wan_models.CONFIGS))
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_key_map_equals_diffusers_converter_for_every_element(config: WanConfig, prefix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # Random bits, compared as bits: every element differs from its neighbours, and nothing is rounded.
    state = {
        prefix + entry.source: torch.empty(entry.shape, dtype=torch.int16).random_(generator=generator)
        for entry in family_of(config).entries(config, ())
    }
    found = fitted({name: TensorInfo("bfloat16", tuple(tensor.shape)) for name, tensor in state.items()})
    expected = wan_models.to_diffusers(state)
    assert expected.keys() == found.key_map.keys()
    for target, part in found.key_map.items():
        assert torch.equal(state[part.source][part.start : part.stop], expected[target]), target


@pytest.mark.parametrize("config", list(wan_models.CONFIGS.values()), ids=list(wan_models.CONFIGS))
def test_diffusers_layout_is_the_class_s_own_state_dict(config: WanConfig) -> None:
    given = {name: TensorInfo.of(tensor) for name, tensor in wan_models.empty_reference(config).state_dict().items()}
    found = fitted(given)
    assert found.config == replace(config, is_original=False)
    assert {target: part.source for target, part in found.key_map.items()} == {name: name for name in given}


@pytest.mark.parametrize("is_original", LAYOUTS, ids=NAMES)
def test_faults_are_named_as_the_file_spells_them(is_original: bool) -> None:
    given = infos(replace(wan_models.TEXT, is_original=is_original), PREFIX)
    key = "blocks.1.self_attn.k.weight" if is_original else "blocks.1.attn1.to_k.weight"
    wide = "blocks.0.ffn.2.weight" if is_original else "blocks.0.ffn.net.2.weight"
    del given[PREFIX + key]
    given[f"{PREFIX}blocks.0.extra.weight"] = TensorInfo("bfloat16", (1,))
    given[PREFIX + wide] = TensorInfo("bfloat16", (512, 320))
    with pytest.raises(BadCheckpoint) as caught:
        fitted(given)
    assert f"1 missing: {PREFIX}{key}" in caught.value.detail
    assert f"1 unexpected: {PREFIX}blocks.0.extra.weight" in caught.value.detail
    assert f"{PREFIX}{wide} is [512, 320], expected [256, 320]" in caught.value.detail


@pytest.mark.parametrize("victim", ["text_embedding.2.weight", "blocks.1.self_attn.q.weight"])
def test_one_misshapen_tensor_does_not_bend_the_configuration(victim: str) -> None:
    given = infos()
    given[victim] = TensorInfo("bfloat16", (512, 256))
    with pytest.raises(BadCheckpoint, match="1 wrongly shaped") as caught:
        fitted(given)
    assert f"{victim} is [512, 256]" in caught.value.detail


def test_a_model_of_images_that_lacks_a_tensor_of_them_is_incomplete() -> None:
    given = infos(wan_models.CLIP_IMAGE)
    del given["img_emb.proj.1.weight"], given["blocks.1.cross_attn.norm_k_img.weight"]
    with pytest.raises(BadCheckpoint, match="2 missing: ") as caught:
        fitted(given)
    assert "img_emb.proj.1.weight" in caught.value.detail


def test_lost_blocks_are_named() -> None:
    lost = {name: info for name, info in infos().items() if not name.startswith("blocks.0.")}
    with pytest.raises(BadCheckpoint, match=r"missing: blocks\.0\."):
        fitted(lost)
    none = {name: info for name, info in infos().items() if not name.startswith("blocks.")}
    with pytest.raises(BadCheckpoint, match=r"no tensor of blocks\.0"):
        fitted(none)
    with pytest.raises(BadCheckpoint, match=r"blocks\.256 exceeds the limit of 256 blocks"):
        fitted({**infos(), "blocks.256.ffn.0.weight": TensorInfo("bfloat16", (320, 256))})


def test_control_blocks_of_vace_are_whole_and_divide_its_blocks() -> None:
    given = infos(wan_models.TWO_CONTROLS)
    lost = "vace_blocks.1.after_proj.weight"
    with pytest.raises(BadCheckpoint, match=f"does not fit wan_vace.*1 missing: {lost}"):
        fitted({name: info for name, info in given.items() if name != lost})
    for names, says in (
        (("blocks.3.",), "2 control blocks .* beside 3 blocks, whose number they have to divide"),
        (("vace_blocks.",), "0 control blocks"),
    ):
        with pytest.raises(BadCheckpoint, match=says):
            fitted({name: info for name, info in given.items() if not name.startswith(names)})
    narrow = {"vace_patch_embedding.weight": TensorInfo("bfloat16", (256, 52, 1, 2, 2))}
    with pytest.raises(Unsupported, match=r"vace_patch_embedding\.weight reads 52 channels, known are 96"):
        fitted(given | narrow)


def test_a_tensor_of_another_variant_is_named() -> None:
    image, text = infos(wan_models.CLIP_IMAGE), infos()
    added = "blocks.0.cross_attn.k_img.weight"
    with pytest.raises(BadCheckpoint, match=f"wan: {added} is a tensor of Wan 2.1 for a first image"):
        fitted(text | {added: image[added]})
    with pytest.raises(Unsupported, match="36 channels to 48"):
        fitted(infos(wan_models.TI2V) | {"patch_embedding.weight": infos(wan_models.IMAGE)["patch_embedding.weight"]})
    control = infos(wan_models.TWO_CONTROLS)
    stray = "vace_blocks.0.norm3.weight"
    with pytest.raises(BadCheckpoint, match=r"does not fit wan_vace.*32 missing: vace_blocks\.0\.after_proj\.bias"):
        fitted(text | {stray: control[stray]})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"face_adapter.fuser_blocks.0.k_norm.weight": (128,)}, "a tensor of Wan Animate"),
        ({"ref_conv.weight": (256, 16, 2, 2)}, "Wan Fun with a reference image"),
        ({"patch_embedding.weight": (256, 52, 1, 2, 2)}, "52 channels to 16: known are 16 to 16"),
        ({"patch_embedding.weight": (256, 48, 1, 2, 2)}, "48 channels to 16"),
    ],
)
def test_variants_are_refused_by_name(more: dict[str, tuple[int, ...]], says: str) -> None:
    given = infos(prefix=PREFIX) | {PREFIX + name: TensorInfo("bfloat16", shape) for name, shape in more.items()}
    with pytest.raises(Unsupported, match=says) as caught:
        fitted(given)
    assert "run another as its class of diffusers (as_class)" in caught.value.detail


@pytest.mark.parametrize("is_original", LAYOUTS, ids=NAMES)
def test_loras_name_layers_in_both_namings(is_original: bool) -> None:
    found = targets_of(Wan(), replace(wan_models.CLIP_IMAGE, is_original=is_original))
    for original, other in (
        ("blocks_0_self_attn_q", "blocks_0_attn1_to_q"),
        ("blocks_1_cross_attn_k_img", "blocks_1_attn2_add_k_proj"),
        ("blocks_1_ffn_0", "blocks_1_ffn_net_0_proj"),
        ("head_head", "proj_out"),
        ("time_projection_1", "condition_embedder_time_proj"),
    ):
        assert found[original].parts == found[other].parts
    control = targets_of(WanVace(), replace(wan_models.TWO_CONTROLS, is_original=is_original))
    assert set(targets_of(Wan(), replace(wan_models.TEXT, is_original=is_original))) <= set(control)
    for original, other in (
        ("vace_blocks_0_before_proj", "vace_blocks_0_proj_in"),
        ("vace_blocks_1_self_attn_q", "vace_blocks_1_attn1_to_q"),
    ):
        assert control[original].parts == control[other].parts
