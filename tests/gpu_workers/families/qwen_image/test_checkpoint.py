"""The Qwen-Image family: recognition, configuration, the key map of every element, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import qwen_image_models
import torch

from xditd.gpu_workers.families.qwen_image.checkpoint import MARKER, QwenImage
from xditd.gpu_workers.families.qwen_image.config import QwenImageConfig
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.lora_targets import targets_of
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.ipc.errors import BadCheckpoint, UnknownFamily, Unsupported

Infos = dict[str, TensorInfo]
PREFIX = "model.diffusion_model."
SMALL = qwen_image_models.BASE
FULL = QwenImageConfig(hidden=3072, blocks=60, text_channels=3584)


def infos(config: QwenImageConfig = SMALL, prefix: str = "") -> Infos:
    return {prefix + entry.source: TensorInfo("bfloat16", entry.shape) for entry in QwenImage().entries(config, ())}


def fitted(given: Infos) -> Resolution:
    return resolve(detect(given.keys()), given)


@pytest.mark.parametrize("prefix", ["", PREFIX, "transformer."])
@pytest.mark.parametrize("config", [SMALL, FULL, qwen_image_models.EDIT_2511, replace(SMALL, blocks=1)])
def test_a_checkpoint_is_recognised_as_its_configuration(config: QwenImageConfig, prefix: str) -> None:
    given = infos(config, prefix)
    found = fitted(given)
    assert found.family.name == "qwen_image"
    assert found.config == config
    assert {part.source for part in found.key_map.values()} == set(given) - {prefix + MARKER}


def test_the_full_size_has_the_known_count() -> None:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        module = QwenImageTransformer2DModel()
    elements = sum(torch.Size(info.shape).numel() for info in infos(FULL).values())
    assert elements == sum(each.numel() for each in module.parameters())
    assert round(elements / 1e9, 2) == 20.43
    parameters = {name: tuple(each.shape) for name, each in module.named_parameters()}
    check_targets(QwenImage(), QwenImage().entries(FULL, ()), parameters)
    check_targets(QwenImage(), QwenImage().entries(replace(FULL, has_marker=True), ()), parameters)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("config", [SMALL, qwen_image_models.EDIT_2511], ids=["base", "2511"])
def test_every_element_is_that_of_the_class(config: QwenImageConfig, prefix: str) -> None:
    state = qwen_image_models.state_dict(0, config, prefix=prefix)
    found = fitted({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    expected = qwen_image_models.reference(bare, config).state_dict()
    assert found.key_map.keys() == expected.keys()
    for target, part in found.key_map.items():
        assert torch.equal(state[part.source][part.start : part.stop], expected[target]), target


def test_faults_are_named_as_the_file_spells_them() -> None:
    given = infos(SMALL, PREFIX)
    del given[f"{PREFIX}transformer_blocks.1.attn.to_out.0.weight"]
    given[f"{PREFIX}transformer_blocks.0.extra"] = TensorInfo("bfloat16", (1,))
    given[f"{PREFIX}txt_norm.weight"] = TensorInfo("bfloat16", (95,))
    with pytest.raises(BadCheckpoint) as caught:
        fitted(given)
    assert f"1 missing: {PREFIX}transformer_blocks.1.attn.to_out.0.weight" in caught.value.detail
    assert f"1 unexpected: {PREFIX}transformer_blocks.0.extra" in caught.value.detail
    assert f"{PREFIX}txt_norm.weight is [95], expected [96]" in caught.value.detail


@pytest.mark.parametrize("victim", ["img_in.weight", "transformer_blocks.1.attn.to_out.0.weight", "proj_out.weight"])
def test_one_misshapen_tensor_does_not_bend_the_configuration(victim: str) -> None:
    given = infos()
    given[victim] = TensorInfo("bfloat16", (512, given[victim].shape[1]))
    with pytest.raises(BadCheckpoint, match="1 wrongly shaped") as caught:
        fitted(given)
    assert f"{victim} is [512, " in caught.value.detail


def test_lost_blocks_are_named() -> None:
    lost = {name: info for name, info in infos().items() if not name.startswith("transformer_blocks.0.")}
    with pytest.raises(BadCheckpoint, match=r"missing: transformer_blocks\.0\."):
        fitted(lost)
    with pytest.raises(BadCheckpoint, match=r"transformer_blocks\.256 exceeds the limit of 256 blocks"):
        fitted({**infos(), "transformer_blocks.256.attn.to_q.weight": TensorInfo("bfloat16", (256, 256))})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"time_text_embed.addition_t_embedding.weight": (2, 256)},
            "Qwen-Image-Layered, which makes several images at once, are not supported",
        ),
        ({"controlnet_blocks.0.weight": (256, 256)}, "ControlNets of Qwen-Image are not supported"),
        ({f"transformer_blocks.{i}.attn.norm_q.weight": (64,) for i in range(2)}, "256 channels in heads of 64"),
        ({"img_in.weight": (256, 128), "proj_out.weight": (128, 256)}, "img_in takes 128 channels, not 64"),
    ],
)
def test_variants_are_refused_by_name(more: dict[str, tuple[int, ...]], says: str) -> None:
    given = infos(SMALL, PREFIX) | {PREFIX + name: TensorInfo("bfloat16", shape) for name, shape in more.items()}
    with pytest.raises(Unsupported, match=says) as caught:
        fitted(given)
    assert "lend Qwen-Image, Qwen-Image-Edit or a fine-tune of them" in caught.value.detail


def test_relatives_are_not_claimed() -> None:
    with pytest.raises(UnknownFamily):
        detect({"txt_in.text_norm.weight", "transformer_blocks.0.attn.to_q.weight"})


def test_loras_name_the_layers_of_the_class() -> None:
    found = targets_of(QwenImage(), SMALL)
    assert [part.layer for part in found["transformer_blocks_1_attn_add_q_proj"].parts] == [
        "transformer_blocks.1.attn.add_q_proj"
    ]
    assert (found["norm_out_linear"].outputs, found["norm_out_linear"].inputs) == (512, 256)
