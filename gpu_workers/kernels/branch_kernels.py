"""A Triton kernel that adds a low-rank branch to the result of a product and applies GELU, in one pass over memory."""

from __future__ import annotations

import logging
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES

logger = logging.getLogger(__name__)

MAX_RANK: Final = 128
"""The largest rank that the kernel is used for: further on sums take longer than a second pass over memory."""
_RANK: Final = 16
_TILE: Final = (64, 128)
_TOLERANCE: Final = 5e-3
"""By norm: one rounding to bfloat16 makes 2e-3."""


@triton.jit(do_not_specialize=["rows"])
def _add_and_gelu(
    out_ptr,
    low_ptr,
    up_ptr,
    rows,
    columns,
    rank,
    out_stride,
    low_stride,
    up_stride,
    alpha,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, RANK):
        inner = start + tl.arange(0, RANK)
        low = tl.load(
            low_ptr + (row * low_stride)[:, None] + inner[None, :],
            mask=(row < rows)[:, None] & (inner < rank)[None, :],
            other=0.0,
        )
        up = tl.load(
            up_ptr + (column * up_stride)[None, :] + inner[:, None],
            mask=(column < columns)[None, :] & (inner < rank)[:, None],
            other=0.0,
        )
        sums = tl.dot(low, up, acc=sums, out_dtype=tl.float32)
    here = out_ptr + (row * out_stride)[:, None] + column[None, :]
    x = tl.load(here, mask=inside, other=0.0).to(tl.float32) + alpha * sums
    # 0.5 * (1 + tanh(u)) is sigmoid(2 u); 1.5957... is 2 * sqrt(2 / pi).
    gelu = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    tl.store(here, gelu.to(out_ptr.dtype.element_ty), mask=inside)


def can_add_and_gelu(out: torch.Tensor, low: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether :func:`add_and_gelu` takes these, and is the quickest way."""
    is_half = out.is_cuda and out.dtype in HALF_DTYPES and low.dtype == up.dtype == out.dtype
    if not is_half or up.shape[1] > MAX_RANK or any(each.stride(1) != 1 for each in (out, low, up)):
        return False
    return _is_right(out.dtype, out.device)


@cache
def _is_right(dtype: torch.dtype, device: torch.device) -> bool:
    """Compile the kernel and compare it with torch once, on this card: a fault leaves LoRAs to torch."""
    out, low, up = (torch.randn(shape, dtype=dtype, device=device) for shape in ((70, 200), (70, 24), (200, 24)))
    expected = F.gelu(out.float() + 0.5 * low.float() @ up.float().t(), approximate="tanh")
    try:
        add_and_gelu(out, low, up, 0.5)
        error = float((out.float() - expected).norm() / expected.norm())
    except Exception as fault:  # noqa: BLE001 - whatever a compiler raises
        logger.warning("no kernel for branches with GELU device=%s reason=%s", device, str(fault).splitlines()[:1])
        return False
    if not error <= _TOLERANCE:
        logger.warning("the kernel for branches with GELU is not used device=%s error=%g", device, error)
    return error <= _TOLERANCE


def add_and_gelu(out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, alpha: float) -> None:
    """Write ``gelu(out + alpha * low @ up.T)`` (tanh) into ``out``; sums are in float32 and rounded once.

    ``out`` is (rows, columns), ``low`` (rows, rank), ``up`` (columns, rank), of one dtype. Columns lie side by side;
    rows may have a stride.
    """
    (rows, columns), rank = out.shape, up.shape[1]
    if not rows:
        return
    grid = (triton.cdiv(columns, _TILE[1]), triton.cdiv(rows, _TILE[0]))
    _add_and_gelu[grid](
        out, low, up, rows, columns, rank, out.stride(0), low.stride(0), up.stride(0), alpha,
        ROWS=_TILE[0], COLUMNS=_TILE[1], RANK=_RANK,
    )  # fmt: skip
