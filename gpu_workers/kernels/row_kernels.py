"""Triton kernels around products in eight bits: rows of activations are quantised before, sums are scaled after.

They round where comfy-kitchen's eager code does: a rotated row to its own dtype, so that its largest number is one of
that dtype; the quotient by the scale to that dtype; the scaled sum before the bias is added. The scale itself stays in
float32. Only a sum in another order can make a number the next one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xditd.gpu_workers.kernels.eight_bits import LARGEST, to_given_scale
from xditd.gpu_workers.kernels.packed_kernels import can_rotate, factors_of, hadamard

LARGEST_INT8 = 127.0
TINY_SCALE = 1e-30
"""The least scale, so that a row of zeros has one, too."""

# Triton's interpreter (for machines without a GPU) takes 10 ms for each program.
_TILE_NUMBERS = 2**16 if triton.knobs.runtime.interpret else 4096
_TILE_COLUMNS = 1024
_MANY_COLUMNS = 4096
"""Longer rows are quantised by 8 warps in place of 4."""
MOST_COLUMNS = 2**15
"""The longest row that one program holds."""


@triton.jit
def _turn(numbers, matrix):
    """Multiply float32 numbers by a matrix of 1, -1 and 0, on tensor cores, to the accuracy of float32.

    Three numbers in bfloat16 hold the 24 bits of one in float32.
    """
    high = numbers.to(tl.bfloat16)
    rest = numbers - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    signs = matrix.to(tl.float32).to(tl.bfloat16)
    sums = tl.dot(low, signs, out_dtype=tl.float32)
    sums = tl.dot(middle, signs, acc=sums, out_dtype=tl.float32)
    return tl.dot(high, signs, acc=sums, out_dtype=tl.float32)


@triton.jit
def _quantise_int8(
    x_ptr,
    values_ptr,
    scales_ptr,
    columns,
    row_stride,
    factor,
    PIECES: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY_SCALE: tl.constexpr,
    TINY_DIVISOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = OUTER * INNER
    column = tl.arange(0, PIECES)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = column < columns
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GROUP > 0:
        x = _turn(tl.reshape(x, (PIECES * OUTER, INNER)), hadamard(INNER, GROUP))
        if OUTER > 1:
            x = tl.permute(tl.reshape(x, (PIECES, OUTER, INNER)), (0, 2, 1))
            x = _turn(tl.reshape(x, (PIECES * INNER, OUTER)), hadamard(OUTER, OUTER))
            x = tl.permute(tl.reshape(x, (PIECES, INNER, OUTER)), (0, 2, 1))
        x = (tl.reshape(x, (PIECES, SIZE)) * factor).to(dtype).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.max(tl.abs(x), 1), 0), LARGEST), TINY_SCALE)
    divisor = scale.to(dtype).to(tl.float32)
    divisor = tl.where(divisor == 0, TINY_DIVISOR, divisor)
    quotient = tl.div_rn(x, tl.zeros_like(x) + divisor).to(dtype).to(tl.float32)
    # Adding 1.5 * 2**23 leaves no bits behind the point: rounded to the nearest, halves to even.
    whole = (quotient + 12582912.0) - 12582912.0
    whole = tl.minimum(tl.maximum(whole, -128.0), 127.0)
    tl.store(values_ptr + row * columns + column, whole.to(tl.int8), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit(do_not_specialize=["rows"])
def _scale_sums(
    sums_ptr,
    row_scales_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    scale_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    here = (row * columns)[:, None] + column[None, :]
    dtype = out_ptr.dtype.element_ty
    sums = tl.load(sums_ptr + here, mask=inside, other=0).to(tl.float32)
    row_scale = tl.load(row_scales_ptr + row, mask=row < rows, other=0.0)
    scale = tl.load(scales_ptr + column * scale_stride, mask=column < columns, other=0.0).to(tl.float32)
    numbers = (sums * (row_scale[:, None] * scale[None, :])).to(dtype)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(dtype).to(tl.float32)
        numbers = (numbers.to(tl.float32) + bias[None, :]).to(dtype)
    tl.store(out_ptr + here, numbers, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _quantise_float8(
    x_ptr,
    scale_ptr,
    values_ptr,
    rows,
    columns,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + (row * row_stride)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    numbers = to_given_scale(x, tl.load(scale_ptr).to(tl.float32), dtype, LARGEST)
    tl.store(values_ptr + (row * columns)[:, None] + column, numbers.to(values_ptr.dtype.element_ty), mask=inside)


def can_quantise_int8(group: int, columns: int) -> bool:
    """Return whether rows of so many columns can be rotated in these groups (0: not at all) and quantised here."""
    return columns <= MOST_COLUMNS and (group == 0 or can_rotate(group, columns))


def quantise_int8(x: torch.Tensor, group: int, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Rotate rows in groups, if ``group`` is not 0, and quantise them, each with its own scale.

    ``x`` is (rows, columns) with contiguous columns, ``values`` int8 of that shape, ``scales`` float32 (rows,), both
    contiguous. :func:`can_quantise_int8` is true.
    """
    rows, columns = x.shape
    assert x.stride(1) == 1 or columns == 1
    if not rows:
        return
    outer, inner = factors_of(group) if group else (1, min(_TILE_COLUMNS, triton.next_power_of_2(columns)))
    pieces = triton.next_power_of_2(triton.cdiv(columns, outer * inner))
    if outer * pieces < 16 and group:
        pieces = 16 // outer  # the least that tl.dot takes
    _quantise_int8[(rows,)](
        x,
        values,
        scales,
        columns,
        x.stride(0),
        float(group) ** -0.5 if group else 1.0,
        PIECES=pieces,
        OUTER=outer,
        INNER=inner,
        GROUP=group,
        LARGEST=LARGEST_INT8,
        TINY_SCALE=TINY_SCALE,
        TINY_DIVISOR=torch.finfo(x.dtype).tiny,
        num_warps=4 if columns <= _MANY_COLUMNS else 8,
    )


def scale_sums(
    sums: torch.Tensor, row_scales: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write ``sums * row_scales * scale + bias`` into ``out``, (rows, columns), both contiguous.

    ``scale`` is one number, or one for each column; ``row_scales`` float32, one for each row; all contiguous.
    """
    rows, columns = out.shape
    if not out.numel():
        return
    across = min(_TILE_COLUMNS, triton.next_power_of_2(columns))
    down = max(1, _TILE_NUMBERS // across)
    _scale_sums[(triton.cdiv(rows, down), triton.cdiv(columns, across))](
        sums,
        row_scales,
        scale,
        scale if bias is None else bias,
        out,
        rows,
        columns,
        0 if scale.numel() == 1 else 1,
        ROWS=down,
        COLUMNS=across,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )


def quantise_float8(x: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> None:
    """Divide rows by one scale and round them to e4m3, at most 448: ``values``, contiguous, of the shape of ``x``."""
    rows, columns = x.shape
    assert x.stride(1) == 1 or columns == 1
    if not x.numel():
        return
    across = min(_TILE_COLUMNS, triton.next_power_of_2(columns))
    down = max(1, _TILE_NUMBERS // across)
    _quantise_float8[(triton.cdiv(rows, down), triton.cdiv(columns, across))](
        x,
        scale,
        values,
        rows,
        columns,
        x.stride(0),
        ROWS=down,
        COLUMNS=across,
        LARGEST=LARGEST,
        num_warps=4,
    )
