"""Quantise the rows of a matrix to eight bits (e4m3), with a scale for each row.

One program reads a row once, finds its largest number, and writes the rounded row. Scales may be given, too, as files
have them for the inputs of a layer: numbers are then multiplied by 1 / scale in their own dtype, as ComfyUI does, and
cut off at 448.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
TINY = 1e-30
"""Lower bound of a row's largest number, so that a row of zeros has a scale, too."""
ADA = (8, 9)
"""The compute capability from which on GPUs multiply e4m3."""
FEWEST_ROWS = 64
"""cuBLAS of CUDA 13.0 refuses fewer than 43 rows in eight bits with row scales, for sums of 12,288 numbers and more. So
fewer rows are padded, which costs no time: reading the weights takes longer."""

# Triton's interpreter (for machines without a GPU) takes 10 ms for each program.
_ROWS_A_PROGRAM = 256 if triton.knobs.runtime.interpret else 1
_MANY_COLUMNS = 4096
"""Rows of more numbers are quantised by 16 warps in place of 8."""
_SCALE_ALIGNMENT = 4
"""A slice of scales starts at a multiple of so many: ``torch._scaled_mm`` needs addresses at multiples of 16 bytes."""


@triton.jit
def to_given_scale(numbers, scale, kind: tl.constexpr, LARGEST: tl.constexpr):
    """Divide numbers of the dtype ``kind``, in float32, by a scale; round where ComfyUI does; at most ``LARGEST``."""
    inverse = tl.div_rn(1.0, scale).to(kind).to(tl.float32)
    scaled = (numbers * inverse).to(kind).to(tl.float32)
    scaled = tl.maximum(scaled, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(scaled, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows", "text_rows"])
def _quantise(
    x_ptr,
    y_ptr,
    out_ptr,
    scales_ptr,
    given_ptr,
    rows,
    text_rows,
    X_WIDTH: tl.constexpr,
    Y_WIDTH: tl.constexpr,
    X_BLOCK: tl.constexpr,
    Y_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    is_row = row < rows
    wide_row = row.to(tl.int64)
    out = out_ptr + wide_row * (X_WIDTH + Y_WIDTH)
    kind = out_ptr.dtype.element_ty
    largest = tl.full((ROWS,), TINY, tl.float32)
    if X_WIDTH > 0:
        x_columns = tl.arange(0, X_BLOCK)[None, :]
        x_inside = is_row & (x_columns < X_WIDTH)
        x = tl.load(x_ptr + wide_row * X_WIDTH + x_columns, mask=x_inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    if Y_WIDTH > 0:
        y_columns = tl.arange(0, Y_BLOCK)[None, :]
        y_inside = is_row & (y_columns < Y_WIDTH)
        given = tl.load(y_ptr + wide_row * Y_WIDTH + y_columns, mask=y_inside, other=0.0)
        y = given.to(tl.float32)
        # GELU by tanh, as y * sigmoid(2 z): sqrt(8 / pi) = 1.5957691.
        y = (y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))).to(given.dtype).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
    if HAS_SCALES:
        scale = tl.load(given_ptr + (row >= text_rows).to(tl.int32))
        tl.store(scales_ptr + row, scale, mask=is_row)
        if X_WIDTH > 0:
            x = to_given_scale(x, scale, x_ptr.dtype.element_ty, LARGEST)
        if Y_WIDTH > 0:
            y = to_given_scale(y, scale, y_ptr.dtype.element_ty, LARGEST)
    else:
        tl.store(scales_ptr + row, (largest / LARGEST)[:, None], mask=is_row)
        inverse = (LARGEST / largest)[:, None]
        if X_WIDTH > 0:
            x = x * inverse
        if Y_WIDTH > 0:
            y = y * inverse
    if X_WIDTH > 0:
        tl.store(out + x_columns, x.to(kind), mask=x_inside)
    if Y_WIDTH > 0:
        tl.store(out + X_WIDTH + y_columns, y.to(kind), mask=y_inside)


class Quantised(NamedTuple):
    """Rows in eight bits: ``values`` (rows, width), each row times its number of ``scales``, (rows,) in float32."""

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Quantised:
        """Allocate ``values`` and ``scales``, with whatever their memory contains."""
        return cls(
            torch.empty(rows, width, dtype=DTYPE, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )

    def padded(self, rows: int) -> Quantised:
        """Return a copy that is padded with rows of zeros to ``rows``."""
        whole = Quantised.empty(rows, self.values.shape[1], self.values.device)
        for part, given in zip(whole, self, strict=True):
            part.zero_()[: len(given)] = given
        return whole

    def halves(self, text_rows: int) -> tuple[Quantised, Quantised]:
        """Return the rows of text and those of images."""
        image_scales = self.scales[text_rows:]
        if text_rows % _SCALE_ALIGNMENT:
            image_scales = image_scales.clone()  # fresh memory is aligned
        return (
            Quantised(self.values[:text_rows], self.scales[:text_rows]),
            Quantised(self.values[text_rows:], image_scales),
        )


def quantise(
    x: torch.Tensor | None = None,
    *,
    gelu_of: torch.Tensor | None = None,
    out: Quantised | None = None,
    scales: torch.Tensor | None = None,
    text_rows: int = 0,
) -> Quantised:
    """Round rows to eight bits, each with the scale that its largest number needs: [``x`` | gelu(``gelu_of``)].

    One of the two may be left out. Both are contiguous, (rows, width), of the same dtype; GELU is the one by tanh.
    ``scales``, float32 (2,), replace them: the first one is that of the first ``text_rows`` rows, the second that of
    all others. ``out`` is written, or else allocated, and returned.
    """
    given = x if x is not None else gelu_of
    assert given is not None
    rows = given.shape[0]
    x_width, y_width = (0 if part is None else part.shape[1] for part in (x, gelu_of))
    if out is None:
        out = Quantised.empty(rows, x_width + y_width, given.device)
    _quantise[(triton.cdiv(rows, _ROWS_A_PROGRAM),)](
        given,
        given if gelu_of is None else gelu_of,
        *out,
        given if scales is None else scales,
        rows,
        text_rows,
        X_WIDTH=x_width,
        Y_WIDTH=y_width,
        X_BLOCK=triton.next_power_of_2(max(x_width, 1)),
        Y_BLOCK=triton.next_power_of_2(max(y_width, 1)),
        ROWS=_ROWS_A_PROGRAM,
        HAS_SCALES=scales is not None,
        LARGEST=LARGEST,
        TINY=TINY,
        num_warps=8 if x_width + y_width <= _MANY_COLUMNS else 16,
    )
    return out
