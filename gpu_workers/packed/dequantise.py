"""Dequantise packed weights with torch: the bits of comfy-kitchen's eager code, into the dtype of the output.

Those of GGUF files are in ``gguf_types.py``.

Numbers are converted in the same order and rounded at the same places. Work in float32 is done in chunks of rows, so
that it takes little memory besides the output; all operations but the rotation treat each number alone, and the
rotation of a row has the same bits in a chunk as among all rows.

Source: comfy-kitchen 0.2.40, ``backends/eager/quantization.py``, ``float_utils.py``, ``tensor/int8_utils.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Final

import torch

from xditd.gpu_workers.packed import gguf_types
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.packed import GGUF_BLOCKS, SCALED_COLUMNS, TILE_COLUMNS, TILE_ROWS

_POSITIVE_OF_FOUR_BITS: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The positive numbers of e2m1, by their bits; the highest of the four is the sign."""
_HADAMARD: Final = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
"""The regular Hadamard matrix of size 4: symmetric, each row with the same sum."""


def dequantise(packed: PackedTensor, out: torch.Tensor) -> torch.Tensor:
    """Write the numbers of a packed weight into ``out``, and return ``out``.

    ``out`` is contiguous, has the logical shape and a floating dtype, and lies on the device of the weight.
    """
    _DEQUANTISERS[packed.format](packed, out)
    return out


def can_dequantise(packed_format: str) -> bool:
    return packed_format in _DEQUANTISERS


def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """Return the rotation of groups of this size, a power of 4, in float32: symmetric, and its own inverse."""
    return _hadamard(size, str(device))


@lru_cache(maxsize=8)
def _hadamard(size: int, device: str) -> torch.Tensor:
    smallest = torch.tensor(_HADAMARD, dtype=torch.float32, device=device)
    found = smallest
    while found.shape[0] < size:
        found = torch.kron(found, smallest)
    return found / math.sqrt(size)  # a power of 2: exact


@lru_cache(maxsize=8)
def _numbers_of_four_bits(dtype: torch.dtype, device: str) -> torch.Tensor:
    positive = torch.tensor(_POSITIVE_OF_FOUR_BITS, dtype=dtype, device=device)
    return torch.cat([positive, -positive])


def _chunks(packed: PackedTensor) -> Iterator[slice]:
    rows, columns = packed.shape[0], math.prod(packed.shape[1:])
    step = max(TILE_ROWS, gguf_types.CHUNK_NUMBERS // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _float8(packed: PackedTensor, out: torch.Tensor) -> None:
    out.copy_(packed.values)
    if packed.scale is not None:
        out.mul_(packed.scale.to(out.dtype))


def _int8(packed: PackedTensor, out: torch.Tensor) -> None:
    for rows, numbers in _scaled_int8(packed):
        out[rows] = numbers


def _int8_convrot(packed: PackedTensor, out: torch.Tensor) -> None:
    rotation = hadamard(packed.group, out.device).T
    for rows, numbers in _scaled_int8(packed):
        groups = numbers.view(numbers.shape[0], -1, packed.group)
        out[rows] = torch.matmul(groups, rotation).view(numbers.shape)


def _scaled_int8(packed: PackedTensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield chunks of rows with their numbers in float32, not rotated back."""
    assert packed.scale is not None
    scale = packed.scale.float()
    for rows in _chunks(packed):
        yield rows, packed.values[rows].float().mul_(scale[rows] if scale.ndim else scale)


def _mxfp8(packed: PackedTensor, out: torch.Tensor) -> None:
    exponents = untiled(packed).to(torch.int32)
    scale = (exponents << 23).view(torch.float32).unsqueeze(-1)  # a power of 2; the lowest exponent is 0.0
    for rows in _chunks(packed):
        blocks = packed.values[rows].float().view(-1, scale.shape[1], SCALED_COLUMNS["mxfp8"])
        out[rows] = blocks.mul_(scale[rows]).view(blocks.shape[0], -1)


def _nvfp4(packed: PackedTensor, out: torch.Tensor) -> None:
    assert packed.scale_2 is not None
    numbers = _numbers_of_four_bits(out.dtype, str(out.device))
    scale = (packed.scale_2.to(out.dtype) * untiled(packed).to(out.dtype)).unsqueeze(-1)
    for rows in _chunks(packed):
        pairs = packed.values[rows]
        bits = torch.stack([pairs >> 4, pairs & 0xF], dim=-1).view(pairs.shape[0], -1)
        blocks = numbers[bits.int()].view(pairs.shape[0], -1, SCALED_COLUMNS["nvfp4"])
        out[rows] = blocks.mul_(scale[rows]).view(pairs.shape[0], -1)


def _gguf(packed: PackedTensor, out: torch.Tensor) -> None:
    gguf_types.dequantise_into(packed.values, packed.format, out)


def untiled(packed: PackedTensor) -> torch.Tensor:
    """Return the scales of a weight whose scales are in tiles as (rows, blocks of a row).

    In a tile of 128 rows and 4 columns, rows 0, 32, 64 and 96 are neighbours: (32, 4, 4).
    """
    assert packed.scale is not None
    rows, columns = packed.scale.shape
    tiles = packed.scale.view(rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)
    return whole[: packed.shape[0], : packed.shape[1] // SCALED_COLUMNS[packed.format]]


_DEQUANTISERS: Final[Mapping[str, Callable[[PackedTensor, torch.Tensor], None]]] = {
    "float8": _float8,
    "int8": _int8,
    "int8_convrot": _int8_convrot,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    **dict.fromkeys(GGUF_BLOCKS, _gguf),
}
