"""Settings of a configuration that a family would not compute with."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CLIPTextConfig, Qwen3Config

from xditd.gpu_workers.models.matching import config_differences
from xditd.ipc.tensors import ModuleDescription

ROPE = {"rope_type": "default", "rope_theta": 1e6}


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
        (SimpleNamespace(hidden=3), {"hidden": 4}, []),  # of a family's own module
        (None, {"hidden": 4}, []),
    ],
)
def test_what_would_be_computed_differently_is_named(built: Any, given: dict[str, Any], differing: list[str]) -> None:
    described = ModuleDescription(class_name="diffusers:X", config=json.dumps(given))
    match: Any = SimpleNamespace(model=SimpleNamespace(module=SimpleNamespace(config=built)), family=SimpleNamespace())
    assert config_differences(described, match) == differing
