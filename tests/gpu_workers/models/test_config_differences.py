"""Settings of a configuration that a family would not compute with."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel, MistralConfig, MistralModel, Qwen3Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from xditd.gpu_workers.families.wan_vae.checkpoint import WanVae
from xditd.gpu_workers.models.config_differences import config_differences
from xditd.ipc.tensors import ModuleDescription

ROPE = {"rope_type": "default", "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("built", "given", "differing"),
    [
        (CLIPTextConfig(), {"hidden_act": "gelu", "dropout": 0.5, "vocab_size": 7}, ["hidden_act='gelu'"]),
        (CLIPTextConfig(), {"hidden_act": "quick_gelu", "layer_norm_eps": None}, []),
        (Qwen3Config(rope_parameters=ROPE), {"rope_theta": 1_000_000}, []),
        (Qwen3Config(rope_parameters=ROPE), {"rope_theta": 1e4}, ["rope_theta=10000.0"]),
        (Qwen3Config(rope_parameters=ROPE), {"rope_parameters": {"rope_theta": 1e4}}, ["rope_theta=10000.0"]),
        ({"axes": (16, 56), "sample_size": 8}, {"axes": [16, 56], "sample_size": 9, "other": 1}, []),
        ({"axes": (16, 56)}, {"axes": [56, 16]}, ["axes=[56, 16]"]),
        (Qwen3Config(rope_parameters=ROPE), {"rope_theta": 1e4, "text_config": {"rope_theta": 1e6}}, []),
        (Qwen3Config(), {"text_config": {"hidden_act": "gelu", "rms_norm_eps": 1e-6}}, ["hidden_act='gelu'"]),
        (
            MistralConfig(rope_parameters=ROPE),
            {"text_config": {"rope_parameters": {"rope_theta": 1e4}}},
            ["rope_theta=10000.0"],
        ),
        (Qwen3Config(rope_parameters=ROPE), {"rope_scaling": YARN}, ["rope_type='yarn'"]),
        (
            Qwen3Config(rope_parameters=ROPE),
            {"rope_scaling": YARN, "rope_parameters": ROPE | YARN},
            ["rope_type='yarn'"],
        ),
        (Qwen3Config(rope_parameters=ROPE), {"rope_scaling": None, "rope_parameters": ROPE}, []),
        (Qwen3Config(rope_parameters=ROPE), {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, []),
        (
            Qwen2_5_VLTextConfig(rope_parameters=ROPE | {"mrope_section": [16, 24, 24]}),
            {"rope_scaling": {"type": "mrope", "mrope_section": [24, 20, 20]}},
            ["mrope_section=[24, 20, 20]"],
        ),
        (MistralConfig(rope_parameters=ROPE), {"text_config": {"rope_scaling": YARN}}, ["rope_type='yarn'"]),
        (SimpleNamespace(hidden=3), {"hidden": 4}, []),  # of a family's own module
        (None, {"hidden": 4}, []),
    ],
)
def test_what_would_be_computed_differently_is_named(built: Any, given: dict[str, Any], differing: list[str]) -> None:
    described = ModuleDescription(class_name="diffusers:X", config=json.dumps(given))
    match: Any = SimpleNamespace(model=SimpleNamespace(module=SimpleNamespace(config=built)), family=SimpleNamespace())
    assert [each.given for each in config_differences(described, match)] == differing


@pytest.mark.parametrize(
    ("given", "differing"),
    [
        ({"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "depth": 3, "tokens_per_second": 9}, []),
        ({"window_size": 56, "num_heads": None}, ["vision_config.window_size=56"]),
        ({"fullatt_block_indexes": [0]}, ["vision_config.fullatt_block_indexes=[0]"]),
        (None, []),
    ],
)
def test_settings_of_the_part_that_reads_pictures_are_compared(given: Any, differing: list[str]) -> None:
    tower = torch.nn.Module()
    tower.config = Qwen2_5_VLVisionConfig()
    module: Any = torch.nn.Sequential(torch.nn.Linear(1, 1), tower)
    module.config = Qwen2_5_VLTextConfig()
    described = ModuleDescription(class_name="diffusers:X", config=json.dumps({"vision_config": given}))
    match: Any = SimpleNamespace(model=SimpleNamespace(module=module), family=SimpleNamespace())
    assert [each.given for each in config_differences(described, match)] == differing
    match.model.module = SimpleNamespace(config=Qwen2_5_VLTextConfig())  # without that part it does not matter
    assert config_differences(described, match) == []


@pytest.mark.parametrize(
    ("given", "differing"),
    [
        ({"text_config": {"rms_norm_eps": 1e-6}, "vision_config": {"window_size": 112}}, []),
        ({"rms_norm_eps": 1e-6}, []),
        ({"text_config": {}}, ["rms_norm_eps=1e-05"]),
        ({"text_config": {"rms_norm_eps": 1e-6}, "vision_config": {"depth": 32}}, []),
        (
            {"text_config": {"rms_norm_eps": 1e-6, "rope_scaling": {"type": "linear", "factor": 2.0}}},
            ["rope_type='linear'"],
        ),
    ],
)
def test_what_a_part_leaves_to_its_class_is_compared(given: dict[str, Any], differing: list[str]) -> None:
    built = Qwen2_5_VLTextConfig(rms_norm_eps=1e-6)
    described = ModuleDescription(
        class_name="transformers:Qwen2_5_VLForConditionalGeneration", config=json.dumps(given)
    )
    match: Any = SimpleNamespace(
        model=SimpleNamespace(module=made(Qwen2_5_VLTextModel, built)), family=SimpleNamespace()
    )
    assert [each.given for each in config_differences(described, match)] == differing


def made(kind: type, config: Any) -> Any:
    """A module of a class of its own, as those of families are, without weights."""
    return type("Module", (kind,), {"__init__": torch.nn.Module.__init__, "config": config})()


@pytest.mark.parametrize(
    ("module", "class_name", "differing"),
    [
        (made(WanTransformer3DModel, {}), "diffusers:WanTransformer3DModel", []),
        (made(WanTransformer3DModel, {}), "diffusers:WanModel", []),  # of the original repository
        (
            made(WanTransformer3DModel, {}),
            "diffusers:ChronoEditTransformer3DModel",
            ["_class_name='ChronoEditTransformer3DModel'"],
        ),
        (made(WanTransformer3DModel, {}), "transformers:CLIPTextModel", ["architectures='CLIPTextModel'"]),
        (made(AutoencoderKLWan, {}), "diffusers:AutoencoderKLQwenImage", []),
        (made(CLIPTextModel, CLIPTextConfig()), "transformers:CLIPTextModelWithProjection", []),
        (made(CLIPTextModel, CLIPTextConfig()), "transformers:T5EncoderModel", ["architectures='T5EncoderModel'"]),
        (made(MistralModel, MistralConfig()), "transformers:Mistral3ForConditionalGeneration", []),
    ],
)
def test_another_class_is_a_difference(module: Any, class_name: str, differing: list[str]) -> None:
    described = ModuleDescription(class_name=class_name, config="{}")
    family = SimpleNamespace(same_classes=WanVae.same_classes)
    match: Any = SimpleNamespace(model=SimpleNamespace(module=module), family=family)
    every = config_differences(described, match)
    found = [each for each in every if each.name in ("_class_name", "architectures")]
    assert [each.given for each in found] == differing
    assert [each.built for each in found] == [repr(type(module).__mro__[1].__name__)] * len(found)
