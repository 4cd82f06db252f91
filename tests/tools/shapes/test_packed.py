"""Packed files mean the folder's weights: fp8, int8 and Q8_0, with their scales and markers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf_files import dequantise
from safetensors.torch import load_file
from shapes.models import build_transformer, save_weights, weights_file
from shapes.packed import _gguf, _q8_0, is_packed, write_packed

from xditd.client.demo.original_names import transformer_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("shapes")
    save_weights(build_transformer(1, 1), path / "transformer" / weights_file("transformer"), torch.float32)
    return path


@pytest.mark.parametrize(("packed_format", "bar"), [("fp8", 0.04), ("int8", 0.01)])
def test_matrices_of_blocks_are_packed(folder: Path, tmp_path: Path, packed_format: str, bar: float) -> None:
    plain = transformer_tensors(load_file(folder / "transformer" / weights_file("transformer")))
    found = load_file(write_packed(folder, tmp_path, packed_format))
    packed = [name for name, each in plain.items() if is_packed(name, each)]
    assert len(packed) == 2 * 5 + 3
    for name, tensor in plain.items():
        if name not in packed:
            assert torch.equal(found[name], tensor.bfloat16())
            continue
        layer = name.removesuffix(".weight")
        scale = found[f"{layer}.weight_scale"]
        meant = found[name].float() * (scale[:, None] if scale.ndim else scale)
        assert (meant - tensor).norm() <= bar * tensor.norm(), name
        marker = json.loads(bytes(found[f"{layer}.comfy_quant"].tolist()))
        assert marker["format"] == ("float8_e4m3fn" if packed_format == "fp8" else "int8_tensorwise")
    assert {each.element_size() for name, each in found.items() if name in packed} == {1}


def test_blocks_of_q8_0_have_a_scale_and_32_numbers() -> None:
    matrix = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    matrix[0] = 0
    blocks = torch.frombuffer(bytearray(_q8_0(matrix)), dtype=torch.uint8).view(6, 2 * 34)
    meant = dequantise(blocks, "q8_0", torch.float32)
    assert torch.equal(meant[0], matrix[0])
    assert (meant - matrix).abs().max() <= matrix.abs().max() / 127


def test_a_gguf_file_begins_its_data_at_a_multiple_of_64_bytes() -> None:
    tensors = {"double_blocks.0.img_attn.proj.weight": torch.ones(1, 32), "img_in.bias": torch.ones(3)}
    raw = _gguf(tensors, torch.float32)
    assert raw.startswith(b"GGUF\x03\0\0\0")
    assert len(raw) % 64 == 0
    assert raw.endswith(torch.ones(3).numpy().tobytes() + bytes(64 - 12))


def test_another_format_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format 'q4_0' is not known; use fp8, int8, q8_0"):
        write_packed(folder, tmp_path, "q4_0")
