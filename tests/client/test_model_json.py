"""``config.json`` and indexes from the internet: what is taken from them, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from xditd.client.model_json import MAX_INDEX_BYTES, describe_config, read_weight_map
from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint, Unsupported

FLUX = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.42.0", "num_layers": 2}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    ("config", "class_name"),
    [
        (FLUX, "diffusers:FluxTransformer2DModel"),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "transformers:T5EncoderModel"),
        ({**FLUX, "architectures": ["T5EncoderModel"]}, "diffusers:FluxTransformer2DModel"),
        ({**FLUX, "quantization_config": None}, "diffusers:FluxTransformer2DModel"),
    ],
)
def test_a_class_and_its_configuration(path: Path, config: dict[str, Any], class_name: str):
    path.write_text(json.dumps(config, indent=2))
    described = describe_config(str(path), allows_family=True)
    assert described.class_name == class_name
    assert json.loads(described.config) == config
    assert described.state == b""
    assert described.allows_family


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5"}, "names no class"),
        ({"architectures": []}, "names no class"),
        ({"architectures": ["T5EncoderModel", "T5Model"]}, "names no class"),
        ({"architectures": "T5EncoderModel"}, "names no class"),
        ({"_class_name": ["mine", "Model"]}, "is no class of diffusers"),
        ({"_class_name": "os.system"}, "is no class of diffusers"),
        ({"_class_name": "other:Model"}, "is no class of diffusers"),
        ({"_class_name": "Model\n"}, "is no class of diffusers"),
        ({"_class_name": ""}, "is no class of diffusers"),
        ({"_class_name": None}, "is no class of diffusers"),
        ({"architectures": [7]}, "is no class of transformers"),
        ({**FLUX, "quantization_config": {"quant_method": "bitsandbytes"}}, "the weights are packed: lend a bfloat16"),
    ],
)
def test_configurations_of_no_class_that_can_be_run(path: Path, config: dict[str, Any], says: str):
    path.write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=says) as caught:
        describe_config(str(path), allows_family=True)
    assert str(path) in caught.value.detail


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"_class_name": "A", "x": NaN}', "it has the number NaN"),
        ('{"_class_name": "A", "x": -Infinity}', "it has the number -Infinity"),
        ('{"_class_name": "A", "x": 1e999}', "a configuration has finite numbers"),
        ('{"_class_name": "A", "x": 1, "x": 2}', "a name appears twice"),
        ('{"_class_name": "A"', "it is not JSON"),
        ("\xff", "it is not JSON"),
        ("", "it is not JSON"),
        ("[1]", "it is a JSON list, not an object"),
        (deep(100_000), "it is not JSON|at most"),
        (deep(20_000), "it is not JSON"),
        ('{"_class_name": "A", "x": ' + "9" * 5_000 + "}", "it is not JSON"),
        (json.dumps({**FLUX, "x": "y" * limits.MAX_TEXT_CHARS}), f"at most {limits.MAX_TEXT_CHARS}"),
        (json.dumps({**FLUX, "x": "y" * 4 * limits.MAX_TEXT_CHARS}), f"at most {4 * limits.MAX_TEXT_CHARS} are read"),
    ],
    ids=range(13),
)
def test_configurations_that_are_malformed(path: Path, text: str, says: str):
    path.write_text(text, encoding="latin-1")
    with pytest.raises(BadCheckpoint, match=says) as caught:
        describe_config(str(path), allows_family=True)
    assert str(path) in caught.value.detail
    assert len(caught.value.detail) < 1_000


def test_what_is_no_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")  # reading it must not wait for a writer
    with pytest.raises(BadCheckpoint, match="not a regular file"):
        describe_config(str(tmp_path / "config.json"), allows_family=True)
    with pytest.raises(BadCheckpoint, match="No such file"):
        describe_config(str(tmp_path / "other.json"), allows_family=True)
    with pytest.raises(BadCheckpoint, match="null"):
        describe_config("a\0b", allows_family=True)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "it has no weight_map"),
        ({"weight_map": ["a"]}, "it has no weight_map"),
        ({"weight_map": {"a": 1}}, "it has no weight_map"),
        ({"weight_map": {}}, "an index of 0 tensors"),
        ({"weight_map": dict.fromkeys(map(str, range(limits.MAX_TENSORS + 1)), "a")}, "16385 tensors"),
        ({"weight_map": {"\ud800": "a.safetensors"}}, "is not Unicode"),
        ({"weight_map": {"a": "\udfff.safetensors"}}, "is not Unicode"),
    ],
    ids=range(7),
)
def test_indexes_that_are_none(tmp_path: Path, index: dict[str, Any], says: str):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match=says):
        read_weight_map(str(path))


def test_an_index_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(BadCheckpoint, match="are read"):
        read_weight_map(str(path))
