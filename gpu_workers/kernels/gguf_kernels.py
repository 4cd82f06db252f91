"""Triton kernels that dequantise blocks of GGUF files: ``q8_0``, ``q4_k``, ``q5_k`` and ``q6_k``.

Results have the bits of the ``gguf`` package in float32: a product of scales and a number has at most 25 bits, and what
has more than 24 is rounded at the same place; other dtypes are rounded once more. A program takes some blocks, which
follow each other along rows, and writes contiguous memory. Scales are computed once for each part of a block, not for
each number. Addresses need no alignment, but are read faster at multiples of 16.

Source: ggml, ``ggml-common.h`` (``block_q8_0`` and so on), ``ggml-quants.c`` (``dequantize_row_q8_0`` and so on).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl

from xditd.ipc.packed import GGUF_BLOCKS

# Triton's interpreter (for machines without a GPU) takes 10 ms for each program.
TILE_NUMBERS = 2**16 if triton.knobs.runtime.interpret else 4096
"""Numbers that one program writes."""
WARPS = 4
"""``benchmarks/run.py packed_products --tiles`` times other tiles and warps."""


@triton.jit
def _half(ptr, mask):
    """Read a float16 at any address, in float32."""
    low = tl.load(ptr, mask=mask, other=0).to(tl.uint16)
    high = tl.load(ptr + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _block_addresses(blocks_ptr, count, blocks_a_row, row_stride, BLOCKS: tl.constexpr, BYTES: tl.constexpr):
    """Return the numbers of this program's blocks, which of them exist, and their addresses, each (BLOCKS,)."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // blocks_a_row
    return block, block < count, blocks_ptr + row * row_stride + (block - row * blocks_a_row) * BYTES


@triton.jit
def _store(out_ptr, block, mask, numbers, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Write the numbers of blocks, (BLOCKS, PARTS, SIZE)."""
    part = tl.arange(0, PARTS)[None, :, None]
    within = tl.arange(0, SIZE)[None, None, :]
    here = out_ptr + block[:, None, None] * (PARTS * SIZE) + part * SIZE + within
    tl.store(here, numbers.to(out_ptr.dtype.element_ty), mask=mask[:, None, None])


@triton.jit
def _q8_0(blocks_ptr, out_ptr, count, blocks_a_row, row_stride, BLOCKS: tl.constexpr):
    """The scale of the block, then 32 numbers."""
    block, mask, at = _block_addresses(blocks_ptr, count, blocks_a_row, row_stride, BLOCKS, 34)
    scale = _half(at, mask)
    within = tl.arange(0, 32)[None, :]
    numbers = tl.load(at[:, None] + 2 + within, mask=mask[:, None], other=0).to(tl.int8, bitcast=True)
    numbers = numbers.to(tl.float32) * scale[:, None]
    tl.store(out_ptr + block[:, None] * 32 + within, numbers.to(out_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _q4_or_q5_k(blocks_ptr, out_ptr, count, blocks_a_row, row_stride, BLOCKS: tl.constexpr, HAS_FIFTH: tl.constexpr):
    """8 parts of 32 numbers. Bytes: the scale of scales and that of offsets, 12 of both, of q5_k 32 of fifth bits, 128.

    Scales and offsets have six bits: the first four scales, then the first four offsets, in the low bits of 8 bytes;
    the other four with their low bits in the last 4 bytes, and their highest two in those of the first 8.
    """
    BYTES: tl.constexpr = 176 if HAS_FIFTH else 144
    block, mask, at = _block_addresses(blocks_ptr, count, blocks_a_row, row_stride, BLOCKS, BYTES)
    part = tl.arange(0, 8)
    is_first = (part < 4)[None, :]
    here = at[:, None] + 4 + (part % 4)[None, :]
    first = tl.load(here, mask=mask[:, None], other=0)
    second = tl.load(here + 4, mask=mask[:, None], other=0)
    third = tl.load(here + 8, mask=mask[:, None], other=0)
    scale = tl.where(is_first, first & 0x3F, (third & 0xF) | ((first >> 2) & 0x30)).to(tl.float32)
    offset = tl.where(is_first, second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)).to(tl.float32)
    scale = scale * _half(at, mask)[:, None]
    offset = offset * _half(at + 2, mask)[:, None]

    parts = part[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    wide_mask = mask[:, None, None]
    low_at = at[:, None, None] + (BYTES - 128) + (parts // 2) * 32 + within
    numbers = (tl.load(low_at, mask=wide_mask, other=0) >> ((parts % 2) * 4).to(tl.uint8)) & 0xF
    if HAS_FIFTH:
        fifth = tl.load(at[:, None, None] + 16 + parts * 0 + within, mask=wide_mask, other=0)
        numbers = numbers | (((fifth >> parts.to(tl.uint8)) & 1) << 4)
    _store(out_ptr, block, mask, numbers.to(tl.float32) * scale[:, :, None] - offset[:, :, None], 8, 32)


@triton.jit
def _q6_k(blocks_ptr, out_ptr, count, blocks_a_row, row_stride, BLOCKS: tl.constexpr):
    """16 parts of 16 numbers. Bytes: 128 of four bits, 64 of two higher ones, 16 of scales, the scale of these.

    Of each half block, 64 bytes have the low bits of 64 numbers, then of 64 more in their high bits, and 32 bytes have
    the higher bits of four times 32 numbers.
    """
    block, mask, at = _block_addresses(blocks_ptr, count, blocks_a_row, row_stride, BLOCKS, 210)
    part = tl.arange(0, 16)
    scale = tl.load(at[:, None] + 192 + part[None, :], mask=mask[:, None], other=0).to(tl.int8, bitcast=True)
    scale = scale.to(tl.float32) * _half(at + 208, mask)[:, None]

    parts = part[None, :, None]
    within = tl.arange(0, 16)[None, None, :]
    wide_mask = mask[:, None, None]
    start, half, rest = at[:, None, None], parts // 8, parts % 8
    low = tl.load(start + half * 64 + (rest % 4) * 16 + within, mask=wide_mask, other=0)
    high = tl.load(start + 128 + half * 32 + (rest % 2) * 16 + within, mask=wide_mask, other=0)
    low = (low >> ((rest // 4) * 4).to(tl.uint8)) & 0xF
    high = (high >> ((rest // 2) * 2).to(tl.uint8)) & 3
    numbers = (low | (high << 4)).to(tl.float32) - 32.0
    _store(out_ptr, block, mask, numbers * scale[:, :, None], 16, 16)


_KERNELS: Final[dict[str, tuple[Any, dict[str, bool]]]] = {
    "q8_0": (_q8_0, {}),
    "q4_k": (_q4_or_q5_k, {"HAS_FIFTH": False}),
    "q5_k": (_q4_or_q5_k, {"HAS_FIFTH": True}),
    "q6_k": (_q6_k, {}),
}
KINDS: Final = frozenset(_KERNELS)
"""The types of blocks that can be dequantised here."""


def dequantise_gguf(blocks: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """Write the numbers of ``blocks`` into ``out``, which is contiguous and has a floating dtype.

    ``blocks`` is uint8 (rows, bytes of a row), of a type in ``KINDS``; rows may be apart.
    """
    numbers, size_bytes = GGUF_BLOCKS[kind]
    rows, row_bytes = blocks.shape
    a_row = row_bytes // size_bytes
    assert blocks.dtype == torch.uint8
    assert row_bytes % size_bytes == 0
    assert out.is_contiguous()
    assert blocks.stride(1) == 1
    assert out.numel() == rows * a_row * numbers
    count = rows * a_row
    if not count:
        return
    kernel, more = _KERNELS[kind]
    tile = TILE_NUMBERS // numbers
    kernel[(triton.cdiv(count, tile),)](
        blocks, out, count, a_row, blocks.stride(0), BLOCKS=tile, num_warps=WARPS, **more
    )
