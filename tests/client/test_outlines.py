"""Outlines say of a component what its manifest says, without its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xditd.client.lending import describe
from xditd.client.outlines import outline_of
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported
from xditd.ipc.tensors import ComponentKind

STATE = {"x.a": torch.ones(4, 2), "x.b": torch.ones(3, dtype=torch.bfloat16), "y.a": torch.ones(1)}


def same_as_described(source: Any, **given: Any) -> None:
    offer = describe(source, **given)
    try:
        manifest = offer.manifest
        outline = outline_of(source, **given)
        assert [(t.name, t.dtype, t.shape) for t in outline.tensors] == [
            (t.name, t.dtype, t.shape) for t in manifest.tensors
        ]
        for name in ("kind", "module", "label", "packed", "compute_dtype"):
            assert getattr(outline, name) == getattr(manifest, name)
        assert outline.faults() == []
    finally:
        offer.close()


def test_of_tensors() -> None:
    same_as_described(STATE, label="x", kind=ComponentKind.VAE, compute_dtype="float16")
    assert outline_of({name: each.to("meta") for name, each in STATE.items()}) == outline_of(STATE)


def test_of_a_file_and_of_a_part_of_it(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    same_as_described(tmp_path / "x.safetensors")
    same_as_described(tmp_path / "x.safetensors", prefix="x.")


def test_of_a_folder(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    for source in (tmp_path, tmp_path / "model.safetensors"):
        same_as_described(source)
        same_as_described(source, kind=ComponentKind.TEXT_ENCODER)
        same_as_described(source, kind=ComponentKind.MODULE)
    with pytest.raises(BadRequest, match="leave one of them out"):
        outline_of(tmp_path, kind=ComponentKind.VAE, as_class=True)


def test_of_packed_weights() -> None:
    state = {
        "a.weight": torch.zeros(16, 16, dtype=torch.float8_e4m3fn),
        "a.scale_weight": torch.ones(()),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    assert outline_of(state).packed
    same_as_described(state)


def test_of_a_configuration() -> None:
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 1}
    outline = outline_of(config, label="x")
    assert outline.module is not None
    assert outline.module.class_name == "diffusers:FluxTransformer2DModel"
    assert outline.module.allows_family
    assert json.loads(outline.module.config) == config
    assert outline.faults() == []


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("/no/such/file.safetensors", BadRequest, "/no/such/file.safetensors"),
        ({"a": 1}, BadRequest, "a is a int, not a tensor"),
        ({3: torch.ones(1)}, BadRequest, "^tensor name 3: "),
        ({"a\udc80": torch.ones(1)}, BadRequest, "^tensor name 'a.udc80': "),
        ({"a": torch.eye(2).to_sparse()}, BadRequest, "^tensor a has the layout"),
        ({"a": torch.empty((1,) * 9, device="meta")}, BadRequest, "^tensor a has 9 dimensions"),
        (dict.fromkeys(map(str, range(20_000)), torch.ones(1)), BadRequest, "^component of 20000 tensors: at most"),
        ({}, BadRequest, "^component without tensors"),
        (3, BadRequest, "^int cannot be prepared"),
        ({"_class_name": "a b"}, Unsupported, "'a b' is no class of diffusers"),
        ({"_class_name": "A", "x": object()}, BadCheckpoint, "the configuration"),
    ],
)
def test_what_cannot_be_outlined_is_refused_by_name(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        outline_of(source)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": 3}, "^label: 3 is of type int"),
        ({"label": "x" * 1000}, "^label 'xxx"),
        ({"as_class": 1}, "^as_class: 1 is of type int"),
        ({"prefix": 3}, "^prefix: 3 is of type int"),
        ({"prefix": "x."}, "^prefix 'x.' selects the tensors of a file"),
        ({"variant": "fp16"}, "^variant 'fp16' selects one of the files"),
        ({"compute_dtype": "float8"}, "^compute_dtype: 'float8'"),
    ],
)
def test_arguments_are_refused_as_those_of_a_lend(given: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        outline_of(STATE, **given)
    with pytest.raises(BadRequest, match=message):
        describe(STATE, **given)


@pytest.mark.parametrize("kind", [ComponentKind.LORA, ComponentKind.TOKENIZER])
def test_what_has_no_model_cannot_be_prepared(tmp_path: Path, kind: ComponentKind) -> None:
    for source in (STATE, tmp_path):
        with pytest.raises(BadRequest, match=f"^kind '{kind.value}': no model is built for it"):
            outline_of(source, kind=kind)
