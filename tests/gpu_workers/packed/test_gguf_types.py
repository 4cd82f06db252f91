"""Numbers of GGUF's block types, bit for bit those of the ``gguf`` package."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from gguf_files import SCALES, dequantise, hostile_blocks

from xditd.gpu_workers.packed import gguf_types
from xditd.gpu_workers.packed.gguf_types import dequantise_into, has_finite_scales
from xditd.ipc.packed import GGUF_BLOCKS

RECORDED = json.loads((Path(__file__).parent / "data" / "gguf_blocks.json").read_text())
HALVES = [torch.bfloat16, torch.float16]
kinds = pytest.mark.parametrize("kind", GGUF_BLOCKS)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Also of zeros with a sign."""
    return found.dtype == expected.dtype and torch.equal(found.view(torch.int32), expected.view(torch.int32))


def from_hex(text: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype)


def hostile(kind: str, rows: int, blocks_per_row: int) -> torch.Tensor:
    return hostile_blocks(kind, rows * blocks_per_row, seed=0).view(rows, -1)


@kinds
def test_numbers_have_the_recorded_bits(kind: str) -> None:
    """Recorded by ``record_gguf_blocks.py``."""
    blocks = from_hex(RECORDED[kind]["blocks"], torch.uint8).view(-1, GGUF_BLOCKS[kind].size_bytes)
    expected = from_hex(RECORDED[kind]["numbers"], torch.float32).view(len(blocks), -1)
    assert same_bits(dequantise(blocks, kind, torch.float32), expected)


@kinds
def test_numbers_have_the_bits_of_the_gguf_package(kind: str) -> None:
    """All bit patterns of scales that are finite: 8,192 blocks, or 2,048 of 256 numbers."""
    gguf = pytest.importorskip("gguf")
    blocks = hostile(kind, 1024, 8 if GGUF_BLOCKS[kind].numbers == 32 else 2)
    expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert same_bits(dequantise(blocks, kind, torch.float32), torch.from_numpy(expected))


@kinds
def test_every_scale_has_the_bits_of_the_gguf_package(kind: str) -> None:
    """Each finite float16 once in every place of a scale, subnormal and negative ones included."""
    gguf = pytest.importorskip("gguf")
    patterns = torch.arange(2**16, dtype=torch.int32)
    finite = patterns[(patterns & 0x7C00) != 0x7C00].to(torch.int16)
    blocks = hostile_blocks(kind, len(finite), 1)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = finite.view(-1, 1).view(torch.uint8)
        finite = finite.flip(0)
    expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert same_bits(dequantise(blocks, kind, torch.float32), torch.from_numpy(expected))


@kinds
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_float32_rounded_once(kind: str, dtype: torch.dtype) -> None:
    blocks = hostile(kind, 64, 8)
    assert torch.equal(dequantise(blocks, kind, dtype), dequantise(blocks, kind, torch.float32).to(dtype))


@kinds
def test_a_slice_of_rows_gives_a_slice_of_the_numbers(kind: str) -> None:
    blocks = hostile(kind, 48, 4)
    whole = dequantise(blocks, kind, torch.bfloat16)
    for rows in (slice(0, 16), slice(7, 8), slice(16, 48), slice(5, 5)):
        assert blocks[rows].data_ptr() == blocks.data_ptr() + rows.start * blocks.shape[1] or rows.start == rows.stop
        assert torch.equal(dequantise(blocks[rows], kind, torch.bfloat16), whole[rows])


@kinds
def test_blocks_may_lie_at_odd_addresses_and_in_rows_apart(kind: str) -> None:
    blocks = hostile(kind, 16, 4)
    expected = dequantise(blocks, kind, torch.float32)
    odd = torch.zeros(blocks.numel() + 1, dtype=torch.uint8)[1:].view_as(blocks).copy_(blocks)
    assert odd.data_ptr() % 2 == 1
    assert torch.equal(dequantise(odd, kind, torch.float32), expected)
    wide = torch.cat([blocks, blocks], dim=1)
    size = GGUF_BLOCKS[kind].size_bytes
    assert torch.equal(dequantise(wide[:, size : 4 * size], kind, torch.float32), expected[:, expected.shape[1] // 4 :])


@kinds
def test_chunks_of_rows_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = hostile(kind, 33, 4)
    expected = dequantise(blocks, kind, torch.bfloat16)
    for numbers in (1, 5 * expected.shape[1]):
        monkeypatch.setattr(gguf_types, "CHUNK_NUMBERS", numbers)
        found = torch.full_like(expected, float("nan"))
        dequantise_into(blocks, kind, found)
        assert torch.equal(found, expected)


@kinds
def test_a_scale_that_is_not_finite_is_found(kind: str) -> None:
    blocks = hostile(kind, 6, 3)
    assert bool(has_finite_scales(blocks, kind))
    size = GGUF_BLOCKS[kind].size_bytes
    for at in SCALES[kind]:
        for bits in (0x7C00, 0xFC00, 0x7E01):  # the infinities, and a NaN
            spoilt = blocks.clone()
            spoilt.view(-1, size)[17, at : at + 2] = torch.tensor([*struct.pack("<H", bits)], dtype=torch.uint8)
            assert not bool(has_finite_scales(spoilt, kind))


@pytest.mark.gpu
@kinds
def test_a_gpu_gives_the_bits_of_the_cpu(kind: str) -> None:
    blocks = hostile(kind, 300, 8)
    for dtype in (torch.float32, *HALVES):
        found = dequantise(blocks.cuda(), kind, dtype).cpu()
        assert torch.equal(found, dequantise(blocks, kind, dtype))


@pytest.mark.gpu
@kinds
def test_memory_besides_the_output_is_bounded(kind: str) -> None:
    blocks = hostile(kind, 16, 4).cuda().repeat(1, 2**21 // GGUF_BLOCKS[kind].numbers)
    out = torch.empty(16, 2**23, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dequantise_into(blocks, kind, out)
    assert torch.cuda.max_memory_allocated() - before < 10 * 2**23
