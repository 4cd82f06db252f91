"""Dequantise the block types of GGUF files with torch, on any device.

A row is a number of blocks, each of 32 numbers, or 256 with scales of their own for each 16 or 32. The float32 results
have the bits of the ``gguf`` package, and hardly depend on how they are computed: a product of a block's scale, the
scale of a part and a number has up to 25 bits, so at most one rounding is needed, and with an offset only that of the
difference. Results in another dtype are those in float32, rounded once.

Rows are dequantised in chunks: besides the output, a chunk takes 1 to 7 bytes for each of its numbers.

Source: ggml, ``ggml-common.h`` (``block_q8_0`` and so on), ``ggml-quants.c`` (``dequantize_row_q8_0`` and so on).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

import torch

from xditd.ipc.packed import GGUF_BLOCKS

_SCALES: Final[Mapping[str, tuple[int, ...]]] = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}
"""The bytes of a block at which its float16 scale starts, and that of its offsets."""
CHUNK_NUMBERS: Final = 2**23
"""Numbers of one chunk of rows: 32 MiB in float32."""
_IQ4_NUMBERS: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What four bits stand for in the IQ4 types (``kvalues_iq4nl``)."""


def dequantise_into(blocks: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """Write the numbers of blocks, uint8 (rows, bytes of a row), into ``out``.

    ``kind`` is a key of ``GGUF_BLOCKS``. ``out`` (rows, numbers of a row) is contiguous, of a floating dtype, on the
    same device.
    """
    block, dequantise_blocks = GGUF_BLOCKS[kind], _DEQUANTISERS[kind]
    assert blocks.dtype == torch.uint8
    assert blocks.shape[1] % block.size_bytes == 0
    per_row = blocks.shape[1] // block.size_bytes
    numbers = out.view(blocks.shape[0], per_row, block.numbers)
    step = max(1, CHUNK_NUMBERS // max(per_row * block.numbers, 1))
    for start in range(0, blocks.shape[0], step):
        chunk = blocks[start : start + step].reshape(-1, block.size_bytes)
        dequantise_blocks(chunk, numbers[start : start + step].view(-1, block.numbers))


def has_finite_scales(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """Return whether all float16 scales in blocks are finite, as a bool tensor without dimensions on their device.

    ``blocks`` is uint8 (rows, bytes of a row). The host does not wait.
    """
    each = blocks.reshape(-1, GGUF_BLOCKS[kind].size_bytes)
    sound = torch.ones((), dtype=torch.bool, device=blocks.device)
    for at in _SCALES[kind]:
        sound &= ((each[:, at + 1] & 0x7C) != 0x7C).all()  # the exponent of infinity and NaN
    return sound


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), _halves(blocks, 0), out=out)


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    numbers = _nibbles(blocks[:, 2:], 32).view(torch.int8).sub_(8)
    torch.mul(numbers, _halves(blocks, 0), out=out)


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    torch.addcmul(_halves(blocks, 2), _nibbles(blocks[:, 4:], 32), _halves(blocks, 0), out=out)


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    numbers = _nibbles(blocks[:, 6:], 32).bitwise_or_(_fifth_bits(blocks[:, 2:6]))
    torch.mul(numbers.view(torch.int8).sub_(16), _halves(blocks, 0), out=out)


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    numbers = _nibbles(blocks[:, 8:], 32).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    torch.addcmul(_halves(blocks, 2), numbers, _halves(blocks, 0), out=out)


def _q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """16 parts of 16 numbers. Bytes: 16 of scales and offsets, 64 of numbers, the scale of each."""
    scale = (blocks[:, :16] & 0xF).mul(_halves(blocks, 80))
    offset = (blocks[:, :16] >> 4).mul(_halves(blocks, 82)).neg_()
    _offset_parts(_bits(blocks[:, 16:80], 32, 2), scale, offset, out)


def _q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """16 parts of 16 numbers. Bytes: 32 of third bits, 64 of the other two, 12 of scales, the scale of these."""
    third = _bits(blocks[:, :32], 32, 1).bitwise_left_shift_(2)
    numbers = _bits(blocks[:, 32:96], 32, 2).bitwise_or_(third).view(torch.int8).sub_(4)
    low = _bits(blocks[:, 96:104], 8, 4)
    high = _bits(blocks[:, 104:108], 4, 2)
    scales = low.bitwise_or_(high.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    _scaled_parts(numbers, scales.mul(_halves(blocks, 108)), out)


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """8 parts of 32 numbers. Bytes: the scale of scales and that of offsets, 12 of both, 128 of numbers."""
    _offset_parts(_nibbles(blocks[:, 16:], 64), *_scales_and_offsets(blocks), out)


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """As ``q4_k``, with 32 bytes of fifth bits before the numbers."""
    fifth = _bits(blocks[:, 16:48], 32, 1).bitwise_left_shift_(4)
    _offset_parts(_nibbles(blocks[:, 48:], 64).bitwise_or_(fifth), *_scales_and_offsets(blocks), out)


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """16 parts of 16 numbers. Bytes: 128 of four bits, 64 of two higher ones, 16 of scales, the scale of these."""
    high = _bits(blocks[:, 128:192], 32, 2).bitwise_left_shift_(4)
    numbers = _nibbles(blocks[:, :128], 128).bitwise_or_(high).view(torch.int8).sub_(32)
    _scaled_parts(numbers, blocks[:, 192:208].view(torch.int8).mul(_halves(blocks, 208)), out)


def _iq4_nl(blocks: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(_iq4_numbers(_nibbles(blocks[:, 2:], 32)), _halves(blocks, 0), out=out)


def _iq4_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """8 parts of 32 numbers. Bytes: the scale of scales, 2 of their high bits, 4 of their low bits, 128 of numbers."""
    high = _neighbours(blocks[:, 2:4], 2).bitwise_left_shift_(4)
    scales = _neighbours(blocks[:, 4:8], 4).bitwise_or_(high).view(torch.int8).sub_(32)
    _scaled_parts(_iq4_numbers(_nibbles(blocks[:, 8:], 32)), scales.mul(_halves(blocks, 0)), out)


def _halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 at this byte of each block as float32 (blocks, 1)."""
    # A copy, because a view needs an even address.
    return blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _bits(packed: torch.Tensor, group: int, width: int) -> torch.Tensor:
    """Unpack numbers of ``width`` bits: in each group of bytes first the lowest bits of all, then the next ones."""
    blocks, size = packed.shape
    shifts = _shifts(8, width, str(packed.device)).view(1, 1, -1, 1)
    unpacked = packed.reshape(blocks, size // group, 1, group) >> shifts
    return unpacked.bitwise_and_(2**width - 1).view(blocks, -1)


def _nibbles(packed: torch.Tensor, numbers: int) -> torch.Tensor:
    """Unpack numbers of four bits: of each ``numbers`` neighbours, the first half is in the low bits of the bytes."""
    return _bits(packed, numbers // 2, 4)


def _neighbours(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack numbers of ``width`` bits that follow each other in each byte, the lowest bits first."""
    return _bits(packed, 1, width)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    return _neighbours(packed, 1).bitwise_left_shift_(4)


def _scales_and_offsets(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and the negated offsets of the 8 parts of ``q4_k`` and ``q5_k``, in float32.

    Six bits each, in 12 bytes: the first four scales, then the first four offsets, in the low bits; the other four
    with their low bits in the last bytes, scales first, and the highest two bits in those of the first bytes.
    """
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = torch.cat([first & 0x3F, (third & 0xF) | ((first >> 2) & 0x30)], dim=1)
    offsets = torch.cat([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], dim=1)
    return scales.mul(_halves(blocks, 0)), offsets.mul(_halves(blocks, 2)).neg_()


def _scaled_parts(numbers: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply each part of a block by its scale."""
    blocks, parts = scales.shape
    torch.mul(numbers.view(blocks, parts, -1), scales.unsqueeze(-1), out=out.view(blocks, parts, -1))


def _offset_parts(numbers: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply each part of a block by its scale, and add its offset."""
    blocks, parts = scales.shape
    torch.addcmul(
        offsets.unsqueeze(-1), numbers.view(blocks, parts, -1), scales.unsqueeze(-1), out=out.view(blocks, parts, -1)
    )


def _iq4_numbers(bits: torch.Tensor) -> torch.Tensor:
    table = _iq4_table(str(bits.device))
    return table.index_select(0, bits.view(-1).int()).view(bits.shape)


@lru_cache(maxsize=8)
def _iq4_table(device: str) -> torch.Tensor:
    return torch.tensor(_IQ4_NUMBERS, dtype=torch.int8, device=device)


@lru_cache(maxsize=32)
def _shifts(bits: int, step: int, device: str) -> torch.Tensor:
    return torch.arange(0, bits, step, dtype=torch.uint8, device=device)


_DEQUANTISERS: Final[Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
"""Functions by type: they take blocks (blocks, bytes of one), and write their numbers (blocks, numbers of one)."""
