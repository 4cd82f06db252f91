"""Dequantised weights have the bits of formulas of the tests' own, and of comfy-kitchen's eager code if it is here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_checkpoints import FORMATS, pack, rotation_of, tiled

from xditd.client.packed_weights import packing_of_tensors
from xditd.gpu_workers.packed import gguf_types
from xditd.gpu_workers.packed.dequantise import dequantise, hadamard, untiled
from xditd.gpu_workers.packed.tensors import PackedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = 384, 192


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    """Weights of several sizes, some columns far larger, and a block of zeros."""
    generator = torch.Generator().manual_seed(0)
    found = 0.02 * torch.randn(ROWS, COLUMNS, generator=generator)
    found[:, 7] *= 30
    found[130:200, 64:96] = 0.0
    return found


def packed_tensor(plain: torch.Tensor, packed_format: str, dtype: torch.dtype) -> tuple[PackedTensor, torch.Tensor]:
    made = pack({"a.weight": plain}, packed_format, dtype)
    (packed,) = packing_of_tensors(made.tensors).packed
    return PackedTensor.of(packed, made.tensors), made.meant["a.weight"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed_format", FORMATS)
def test_numbers_are_those_that_the_format_means(plain: torch.Tensor, packed_format: str, dtype: torch.dtype) -> None:
    packed, meant = packed_tensor(plain, packed_format, dtype)
    out = torch.full((ROWS, COLUMNS), torch.nan, dtype=dtype)
    assert dequantise(packed, out) is out
    assert torch.equal(out, meant)
    assert (out.float() - plain).norm() / plain.norm() < 0.3  # one scale for all, and a column 30 times as large


@pytest.mark.parametrize("packed_format", FORMATS)
def test_rows_are_views_with_the_bits_of_the_whole(plain: torch.Tensor, packed_format: str) -> None:
    packed, meant = packed_tensor(plain, packed_format, torch.float32)
    memory = {each.untyped_storage().data_ptr() for each in packed.tensors}
    for start, stop in ((0, 128), (128, 384), (256, 384)):
        part = packed.rows(start, stop)
        assert {each.untyped_storage().data_ptr() for each in part.tensors} == memory
        assert all(each.is_contiguous() for each in part.tensors)
        assert torch.equal(dequantise(part, torch.empty(part.shape)), meant[start:stop])


@pytest.mark.parametrize("packed_format", ["int8_convrot", "int8", "mxfp8", "nvfp4"])
def test_chunks_of_rows_change_no_bit(plain: torch.Tensor, packed_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, meant = packed_tensor(plain, packed_format, torch.bfloat16)
    monkeypatch.setattr(gguf_types, "CHUNK_NUMBERS", 1)  # 128 rows at a time
    assert torch.equal(dequantise(packed, torch.empty(packed.shape, dtype=torch.bfloat16)), meant)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_rotation_is_regular_symmetric_and_its_own_inverse(size: int) -> None:
    rotation = hadamard(size, torch.device("cpu"))
    assert torch.equal(rotation, rotation_of(size))
    assert torch.equal(rotation, rotation.T)
    assert torch.equal(rotation @ rotation, torch.eye(size))
    assert torch.equal(rotation.sum(dim=0), rotation.sum(dim=0)[:1].expand(size))


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 4), (200, 3), (384, 12)])
def test_scales_in_tiles_are_found_at_their_places(rows: int, blocks: int) -> None:
    scales = torch.randint(0, 255, (rows, blocks), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    packed = PackedTensor("mxfp8", (rows, 32 * blocks), torch.empty(0), tiled(scales))
    assert torch.equal(untiled(packed), scales)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]], dtype=torch.float16)])
def test_one_scale_may_have_any_number_of_dimensions(scale: torch.Tensor) -> None:
    tensors = {"a.weight": torch.arange(4.0).to(torch.float8_e4m3fn).view(2, 2), "a.weight_scale": scale}
    (packed,) = packing_of_tensors(tensors).packed
    found = dequantise(PackedTensor.of(packed, tensors), torch.empty(2, 2))
    assert found.tolist() == [[0.0, 0.5], [1.0, 1.5]]


@pytest.fixture(scope="module")
def kitchen() -> Any:
    package = pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends.eager import quantization

    assert package is not None
    return quantization


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [512, 3072])
def test_comfy_kitchen_gives_the_same_bits(kitchen: Any, dtype: torch.dtype, columns: int) -> None:
    """3,072 columns of 5,000 rows take several chunks."""
    rows = 5_000 if columns == 3_072 else 384
    plain = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    code = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]
    scale, whole = plain.abs().max() / 448, plain.abs().max() / (448 * 6)
    fp8 = kitchen.quantize_per_tensor_fp8(plain.clone(), scale)
    int8, int8_scale = kitchen.quantize_int8_rowwise(plain)
    rotated, rotated_scale = kitchen.quantize_int8_convrot_weight(plain, 256)
    mxfp8, mxfp8_scale = kitchen.quantize_mxfp8(plain)
    nvfp4, nvfp4_scale = kitchen.quantize_nvfp4(plain, whole)
    cases = [
        (
            PackedTensor("float8", plain.shape, fp8, scale),
            kitchen.dequantize_per_tensor_fp8(fp8, scale, dtype),
        ),
        (
            PackedTensor("int8", plain.shape, int8, int8_scale),
            kitchen.dequantize_int8_simple_dtype(int8, int8_scale, code),
        ),
        (
            PackedTensor("int8_convrot", plain.shape, rotated, rotated_scale, group=256),
            kitchen.dequantize_int8_convrot_weight_dtype(rotated, rotated_scale, 256, code),
        ),
        (
            PackedTensor("mxfp8", plain.shape, mxfp8, mxfp8_scale.view(torch.uint8)),
            kitchen.dequantize_mxfp8(mxfp8, mxfp8_scale, dtype),
        ),
        (
            PackedTensor("nvfp4", plain.shape, nvfp4, nvfp4_scale, whole),
            kitchen.dequantize_nvfp4(nvfp4, whole, nvfp4_scale, dtype),
        ),
    ]
    for packed, expected in cases:
        assert torch.equal(dequantise(packed, torch.empty(plain.shape, dtype=dtype)), expected), packed.format
