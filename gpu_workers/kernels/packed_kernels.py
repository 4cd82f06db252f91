"""Triton kernels that dequantise packed weights of eight bits: ``float8``, ``int8`` and ``int8_convrot``.

Each number is read once, computed in float32 and written once, in the dtype of the output. ``float8`` and ``int8`` have
the bits of the versions in torch, which round at the same places. ``int8_convrot`` is more exact than torch: the
rotation of a group sums whole numbers below 2**24 without any rounding, then comes one product with the scale, which is
rounded to float32 and then to the output's dtype. Torch rounds each partial sum in float32. So results differ by at
most one rounding of the output's dtype, and of float32 at the size of the group's largest sum.

Rows of the packed values may be further apart than they are long; the numbers of a row are contiguous. Addresses need
no alignment, but are read faster at multiples of 16.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

# Triton's interpreter (for machines without a GPU) takes 10 ms for each program.
_IS_INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
TILE_NUMBERS = 2**16 if _IS_INTERPRETED else 4096
"""Numbers that one program of ``float8`` and ``int8`` reads."""
TILE_COLUMNS = 1024
"""The most numbers of one row that such a program reads."""
ROTATED_NUMBERS = 2**16 if _IS_INTERPRETED else 8192
"""Numbers that one program of ``int8_convrot`` reads."""
WARPS = 4
"""``benchmarks/run.py packed_products --tiles`` times other tiles and warps."""

_LEAST_DOT: Final = 16
"""The least size of a matrix that ``tl.dot`` multiplies."""
GROUPS: Final = (4, 16, 64, 256, 1024)
"""Groups of ``int8_convrot`` that can be rotated here: sums of 1024 numbers of eight bits are exact in float32."""


@triton.jit
def hadamard(SIZE: tl.constexpr, GROUP: tl.constexpr):
    """Return the regular Hadamard matrix of GROUP, of 1 and -1, repeated along the diagonal of (SIZE, SIZE).

    That of size 4 has -1 where row and column are 3 together; larger ones are its Kronecker powers. So the sign depends
    on how many digits of row and column, in base 4, are 3 together, which is where their bits all differ.
    """
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    differ = row ^ column
    threes = differ & (differ >> 1) & 0x55555555
    threes = threes ^ (threes >> 8)
    threes = threes ^ (threes >> 4)
    threes = threes ^ (threes >> 2)
    sign = 1 - 2 * (threes & 1)
    return tl.where(differ < GROUP, sign, 0)


@triton.jit
def rotate_groups(numbers, GROUPS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr):
    """Rotate each row of (GROUPS, OUTER * INNER), without the factor 1 / sqrt(GROUP), in float32.

    As a Kronecker product the rotation is one of INNER neighbours, then one of OUTER numbers that are INNER apart.
    Whole numbers of eight bits stay exact: the first sums are below 2**11 with ``INNER`` 16, which float16 holds.
    """
    pairs = tl.reshape(numbers, (GROUPS * OUTER, INNER))
    sums = tl.dot(pairs.to(tl.float16), hadamard(INNER, GROUP).to(tl.float16), out_dtype=tl.float32)
    if OUTER > 1:
        turned = tl.permute(tl.reshape(sums, (GROUPS, OUTER, INNER)), (0, 2, 1))
        flat = tl.reshape(turned, (GROUPS * INNER, OUTER)).to(tl.float16)
        sums = tl.dot(flat, hadamard(OUTER, OUTER).to(tl.float16), out_dtype=tl.float32)
        sums = tl.permute(tl.reshape(sums, (GROUPS, INNER, OUTER)), (0, 2, 1))
    return tl.reshape(sums, (GROUPS, OUTER * INNER))


@triton.jit
def _float8_bits(bits, IS_E5M2: tl.constexpr):
    """Return the numbers of float8 bits, uint8, in float32. GPUs before Ada have no such conversion."""
    wide = bits.to(tl.uint16)
    if IS_E5M2:
        return (wide << 8).to(tl.float16, bitcast=True).to(tl.float32)
    magnitude = wide & 0x7F
    # The exponent has a bias of 7, that of float16 has one of 15.
    numbers = (((wide & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), numbers)


@triton.jit(do_not_specialize=["rows"])
def _dequantise_tiles(
    values_ptr,
    scales_ptr,
    out_ptr,
    rows,
    columns,
    row_stride,
    scale_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    dtype = out_ptr.dtype.element_ty
    values = tl.load(values_ptr + (row * row_stride)[:, None] + column, mask=inside, other=0)
    numbers = values.to(tl.float32)
    if KIND != "int8":
        numbers = _float8_bits(values, KIND == "e5m2").to(dtype).to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(scales_ptr + row * scale_stride, mask=row < rows, other=0.0)
        if KIND != "int8":  # torch multiplies in the output's dtype
            scale = scale.to(dtype)
        numbers = numbers * scale.to(tl.float32)[:, None]
    tl.store(out_ptr + (row * columns)[:, None] + column, numbers.to(dtype), mask=inside)


@triton.jit
def _dequantise_rotated(
    values_ptr,
    scales_ptr,
    out_ptr,
    pieces,
    pieces_a_row,
    row_stride,
    scale_stride,
    factor,
    PIECES: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A piece is a group, or several small ones that ``tl.dot`` rotates together."""
    SIZE: tl.constexpr = OUTER * INNER
    piece = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    is_piece = piece < pieces
    row = piece // pieces_a_row
    within = tl.arange(0, SIZE)[None, :]
    address = row * row_stride + (piece - row * pieces_a_row) * SIZE
    values = tl.load(values_ptr + address[:, None] + within, mask=is_piece[:, None], other=0)
    sums = rotate_groups(values, PIECES, OUTER, INNER, GROUP)
    scale = tl.load(scales_ptr + row * scale_stride, mask=is_piece, other=0.0).to(tl.float32) * factor
    numbers = (sums * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + piece[:, None] * SIZE + within, numbers, mask=is_piece[:, None])


def factors_of(group: int) -> tuple[int, int]:
    """Return ``OUTER`` and ``INNER`` for a group in ``GROUPS``; several groups fit in ``INNER`` if they are small."""
    if group <= 4 * _LEAST_DOT:
        return 1, max(group, _LEAST_DOT)
    return group // _LEAST_DOT, _LEAST_DOT


def can_rotate(group: int, columns: int) -> bool:
    """Return whether groups of this size can be rotated in rows of so many columns."""
    return group in GROUPS and columns % max(group, _LEAST_DOT) == 0


def dequantise_int8(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, group: int = 0) -> None:
    """Write ``values * scale`` into ``out``, rotated back in groups of ``group`` columns if that is not 0.

    ``values`` is int8 (rows, columns), ``scale`` one number or (rows, 1), ``out`` contiguous (rows, columns). With a
    group, :func:`can_rotate` has to be true.
    """
    if not group:
        _tiles("int8", values, scale, out)
        return
    outer, inner = factors_of(group)
    rows, columns = values.shape
    assert out.is_contiguous()
    assert values.stride(1) == 1
    assert can_rotate(group, columns)
    size = outer * inner
    count = rows * columns // size
    if not count:
        return
    tile = max(1, ROTATED_NUMBERS // size)
    _dequantise_rotated[(triton.cdiv(count, tile),)](
        values,
        scale,
        out,
        count,
        columns // size,
        values.stride(0),
        _row_stride(scale),
        group**-0.5,
        PIECES=tile,
        OUTER=outer,
        INNER=inner,
        GROUP=group,
        num_warps=WARPS,
    )


def dequantise_float8(values: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write ``values`` (e4m3fn or e5m2, rows and columns) into ``out``, times ``scale``: one number or (rows, 1)."""
    kind = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}[values.dtype]
    _tiles(kind, values.view(torch.uint8), scale, out)


def _tiles(kind: str, values: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor) -> None:
    rows, columns = values.shape
    assert out.is_contiguous()
    assert values.stride(1) == 1 or columns == 1
    if not values.numel():
        return
    across = min(TILE_COLUMNS, triton.next_power_of_2(columns))
    down = max(1, TILE_NUMBERS // across)
    _dequantise_tiles[(triton.cdiv(rows, down), triton.cdiv(columns, across))](
        values,
        values if scale is None else scale,
        out,
        rows,
        columns,
        values.stride(0),
        0 if scale is None else _row_stride(scale),
        ROWS=down,
        COLUMNS=across,
        KIND=kind,
        HAS_SCALE=scale is not None,
        num_warps=WARPS,
    )


def _row_stride(scale: torch.Tensor) -> int:
    return 0 if scale.numel() == 1 else scale.stride(0)
