"""A Triton kernel that multiplies rows with a weight and adds a low-rank branch before it writes the result.

The branch is a few more columns of the inputs: it costs no pass over the results. It needs the tensor memory
accelerator of GPUs of compute capability 9.0, where it was measured (``benchmarks/run.py branches``).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from xditd.gpu_workers.kernels.cublaslt import alignment
from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES

logger = logging.getLogger(__name__)

MAX_RANK: Final = 64
"""The largest rank that the kernel takes: more does not fit into shared memory beside the tiles."""
MIN_INPUTS: Final = 64
_HOPPER: Final = (9, 0)
_ALIGNMENT: Final = 16
"""Bytes, of addresses and of strides between rows."""
_MOST_WASTE: Final = 1.1
"""By how much the last tiles, which do not fill the GPU, may lengthen the work."""
_TOLERANCE: Final = 5e-3
"""By norm: one rounding to bfloat16 makes 2e-3."""


class Tiles(NamedTuple):
    """Sizes of a tile of the result, and how many inputs are multiplied at a time."""

    rows: int = 128
    columns: int = 256
    inputs: int = 64
    warps: int = 8
    stages: int = 3


TILES: Final = Tiles()
"""For an H200, tried with others of 128 and 256, 2 to 4 stages, with and without a loop over tiles."""
_ROWS_OF_TILES: Final = 18
"""How many rows of tiles (2,304 rows) the programs compute together, column by column, so that they share a weight's
columns in L2. Tried with others of 4 to 36 on an H200 (docs/lora.md)."""


@triton.jit
def _tanh(x, IS_EXACT: tl.constexpr):
    if IS_EXACT:  # the interpreter has no assembler
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _finish(
    sums, bias_ptr, out_tiles, row, column, columns, PART: tl.constexpr, HAS_GELU: tl.constexpr, IS_EXACT: tl.constexpr
):
    here = column + tl.arange(0, PART)
    x = sums + tl.load(bias_ptr + here, mask=here < columns, other=0.0).to(tl.float32)[None, :]
    if HAS_GELU:  # 0.797... is sqrt(2 / pi)
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x), IS_EXACT))
    out_tiles.store([row, column], x.to(bias_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x_tiles,
    weight_tiles,
    low_tiles,
    up_tiles,
    out_tiles,
    bias_ptr,
    rows,
    columns,
    inputs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HAS_GELU: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    down = tl.cdiv(rows, ROWS)
    # Each program computes every ``PROGRAMS``-th tile. Neighbours in time share rows or columns, which stay in L2.
    for tile in tl.range(tl.program_id(0), across * down, PROGRAMS, flatten=True):
        first = tile // (GROUP * across) * GROUP
        group = min(down - first, GROUP)
        row = (first + tile % group) * ROWS
        column = tile % (GROUP * across) // group * COLUMNS
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for part in range(tl.cdiv(inputs, INPUTS)):
            x = x_tiles.load([row, part * INPUTS])
            weight = weight_tiles.load([column, part * INPUTS])
            sums = tl.dot(x, weight.T, sums)
        sums = tl.dot(low_tiles.load([row, 0]), up_tiles.load([column, 0]).T, sums)
        # In two halves, so that less shared memory is needed.
        halves = tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish(left, bias_ptr, out_tiles, row, column, columns, COLUMNS // 2, HAS_GELU, IS_EXACT)
        _finish(right, bias_ptr, out_tiles, row, column + COLUMNS // 2, columns, COLUMNS // 2, HAS_GELU, IS_EXACT)


def can_multiply(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, up: torch.Tensor, out: torch.Tensor
) -> bool:
    """Return whether :func:`multiply_with_branch` takes these, and is quicker than two products.

    A rule on shapes alone, so that a job has the same bits each time.
    """
    if not _has_kernel(rows.device):
        return False
    tensors = (rows, weight.t(), up, out)
    if rows.dtype not in HALF_DTYPES or any(each.dtype != rows.dtype for each in (*tensors, bias)):
        return False
    if (
        up.shape[1] > MAX_RANK
        or rows.shape[1] < MIN_INPUTS
        or not all(map(_is_aligned, tensors))
        or not bias.is_contiguous()
    ):
        return False
    tiles = triton.cdiv(out.shape[0], TILES.rows) * triton.cdiv(out.shape[1], TILES.columns)
    programs = _programs(rows.device)
    if triton.cdiv(tiles, programs) * programs > _MOST_WASTE * tiles:
        return False
    return _is_right(rows.dtype, rows.device)


def prepare(dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels for a dtype and a GPU, once. It takes seconds, which the steps of a job may not have."""
    if _has_kernel(device) and dtype in HALF_DTYPES:
        _is_right(dtype, device)


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == _HOPPER


def _is_aligned(tensor: torch.Tensor) -> bool:
    stride = tensor.stride(0) * tensor.itemsize
    return tensor.stride(1) == 1 and alignment(tensor) >= _ALIGNMENT and stride % _ALIGNMENT == 0


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _is_right(dtype: torch.dtype, device: torch.device) -> bool:
    """Compile the kernels and compare them with torch once, on this card: after a fault LoRAs take other products."""
    for rank, has_gelu in ((16, False), (16, True), (MAX_RANK, False), (MAX_RANK, True)):
        x, weight, up, low = (
            torch.randn(shape, dtype=dtype, device=device) / shape[1] ** 0.5
            for shape in ((200, 192), (520, 192), (520, rank), (200, rank))
        )
        bias, out = weight[:, 0].contiguous(), torch.empty(200, 520, dtype=dtype, device=device)
        expected = x.float() @ weight.float().t() + bias.float() + low.float() @ up.float().t()
        if has_gelu:
            expected = F.gelu(expected, approximate="tanh")
        try:
            multiply_with_branch(x, weight.t(), bias, low, up, out, gelu=has_gelu)
            error = float((out.float() - expected).norm() / expected.norm())
        except Exception as fault:  # noqa: BLE001 - whatever a compiler raises
            logger.warning(
                "no kernel for products with branches device=%s reason=%s", device, str(fault).splitlines()[:1]
            )
            return False
        if not error <= _TOLERANCE:
            logger.warning("the kernel for products with branches is not used device=%s error=%g", device, error)
            return False
    return True


def multiply_with_branch(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    low: torch.Tensor,
    up: torch.Tensor,
    out: torch.Tensor,
    *,
    gelu: bool,
    tiles: Tiles = TILES,
) -> None:
    """Write ``rows @ weight + bias + low @ up.T`` into ``out``, or GELU (tanh) of that; sums are in float32.

    ``rows`` are (n, in), ``weight`` (in, out), a transposed view, ``low`` (n, rank), ``up`` (out, rank) and ``out``
    (n, out), of one dtype; ``rank`` is at most 64. Rows lie apart by multiples of 16 bytes.
    """
    if not rows.shape[0]:
        return
    count, rank = out.shape[0], triton.next_power_of_2(max(16, up.shape[1]))
    given: tuple[tuple[torch.Tensor, list[int]], ...] = (
        (rows, [tiles.rows, tiles.inputs]),
        (weight.t(), [tiles.columns, tiles.inputs]),
        (low, [tiles.rows, rank]),
        (up, [tiles.columns, rank]),
        (out, [tiles.rows, tiles.columns // 2]),
    )
    described: list[Any] = [TensorDescriptor.from_tensor(tensor, block) for tensor, block in given]
    tile_count = triton.cdiv(count, tiles.rows) * triton.cdiv(out.shape[1], tiles.columns)
    programs = _programs(rows.device) if rows.is_cuda else 2
    _multiply[(min(programs, tile_count),)](
        *described, bias, count, out.shape[1], rows.shape[1],
        ROWS=tiles.rows, COLUMNS=tiles.columns, INPUTS=tiles.inputs, GROUP=_ROWS_OF_TILES, PROGRAMS=programs,
        HAS_GELU=gelu, IS_EXACT=triton.knobs.runtime.interpret, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
