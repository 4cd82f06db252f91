"""Products of plain weights in half precision: torch's, or, where as fast, those of cuBLASLt without a workspace.

Both have the same bits, or torch's stays. A kind of product is torch's until :func:`measure_pending` has timed it, once
in the life of the process, so that no forward waits for that.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels.cublaslt import MAX_ALIGNMENT, DenseKind, Refused, StaticProduct, alignment
from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES
from xditd.gpu_workers.kernels.timings import times_ms

logger = logging.getLogger(__name__)

MAX_KINDS: Final = 512
"""Kinds that are remembered; further ones are torch's."""
MAX_PENDING: Final = 32
"""Kinds that are timed at a time."""
_AS_FAST: Final = 1.005
"""The largest ratio of its time to torch's with which a static product is taken. Kernels are timed on a stream; in
a CUDA graph a memset also leaves a gap before the product."""
_BIAS_ALIGNMENT: Final = 16
"""Bytes; cuBLASLt asks for the alignments of all tensors but the bias, which its kernels may read in vectors."""
_REPEATS: Final = 3
_AHEAD_CYCLES: Final = 1_000_000

_ways: dict[DenseKind, StaticProduct | None] = {}
"""The static product of a kind; ``None``: torch's."""
_pending: dict[DenseKind, None] = {}


def multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gelu: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``rows`` (n, in) by ``weight`` (in, out), a transposed view of a layer's, plus ``bias``; or fill ``out``.

    ``gelu``: GELU (tanh) of that, on GPUs in the epilogue of the product, before it is rounded.
    """
    if not rows.is_cuda or rows.dtype not in HALF_DTYPES:
        return _by_torch(rows, weight, bias, gelu=gelu, out=out)
    result = rows.new_empty(rows.shape[0], weight.shape[1]) if out is None else out
    kind = kind_of(rows, weight, bias, result, gelu=gelu)
    if kind is None:
        return _by_torch(rows, weight, bias, gelu=gelu, out=result)
    way = _ways.get(kind)
    if way is None:
        if kind not in _ways and len(_pending) < MAX_PENDING and len(_ways) < MAX_KINDS:
            _pending[kind] = None
        return _by_torch(rows, weight, bias, gelu=gelu, out=result)
    note_captured(rows, weight, bias)
    try:
        way.run(rows, weight, bias, result)
    except Refused as refused:
        _note_refused(kind, refused)
        return _by_torch(rows, weight, bias, gelu=gelu, out=result)
    return result


def add_product(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, gelu: bool = False) -> None:
    """Add ``rows`` (n, in) by ``weight`` (in, out) to ``out`` (n, out); with ``gelu``, write GELU (tanh) of the sum.

    On GPUs the sum is rounded once: cuBLASLt reads ``out`` in the epilogue of the product, which torch has without
    GELU alone. No kind is timed, so that it has the same bits each time.
    """
    if rows.is_cuda and rows.dtype in HALF_DTYPES:
        kind = kind_of(rows, weight, None, out, gelu=gelu)
        way = None if kind is None else _adding(kind)
        if way is not None:
            note_captured(rows, weight, out)
            way.run(rows, weight, None, out, adds=True)
            return
    out.addmm_(rows, weight)
    if gelu:
        torch.ops.aten.gelu_(out, approximate="tanh")


@lru_cache(MAX_KINDS)
def _adding(kind: DenseKind) -> StaticProduct | None:
    try:
        return StaticProduct(kind)
    except Refused as refused:
        logger.info("static product refused kind=%s reason=%s", kind, refused)
        return None


def note_captured(*tensors: torch.Tensor | None) -> None:
    """Let a capture of the current stream know tensors that no operator of torch reads: it keeps those that it sees."""
    if torch.cuda.is_current_stream_capturing():
        for each in tensors:
            if each is not None:
                each.detach()


def measure_pending(device: torch.device) -> None:
    """Time the kinds of products that have run since the last call, on random numbers; 10 ms each on one H200."""
    pending = list(_pending)
    _pending.clear()
    for kind in pending:
        try:
            found = compare(kind, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        except Refused as refused:
            _note_refused(kind, refused)
        else:
            _ways[kind] = found.static if found.is_static_taken else None


class Comparison(NamedTuple):
    """Milliseconds of both products of one kind, and whether their bits are the same."""

    static: StaticProduct
    torch_ms: float
    static_ms: float
    is_same: bool

    @property
    def is_static_taken(self) -> bool:
        return self.is_same and self.static_ms <= _AS_FAST * self.torch_ms


def compare(kind: DenseKind, device: torch.device) -> Comparison:
    """Run both products of a kind on random numbers, and time them.

    Raises:
        Refused: cuBLASLt has none without a workspace.
        torch.OutOfMemoryError: there is no room for the tensors.
    """
    strides, alignments = kind.strides, kind.alignments
    generator = torch.Generator(device).manual_seed(0)

    def numbers(shape: tuple[int, int], stride: int, aligned: int) -> torch.Tensor:
        size = (shape[0] - 1) * stride + shape[1]
        found = torch.empty(size + MAX_ALIGNMENT, dtype=kind.dtype, device=device).normal_(generator=generator)
        return found.as_strided(shape, (stride, 1), aligned % MAX_ALIGNMENT // found.itemsize)

    weight = numbers((kind.outputs, kind.inputs), strides[0], alignments[0]).t()
    rows = numbers((kind.rows, kind.inputs), strides[1], alignments[1])
    out, expected = (numbers((kind.rows, kind.outputs), strides[2], alignments[2]) for _ in range(2))
    bias = numbers((1, kind.outputs), kind.outputs, alignments[3])[0] if kind.has_bias else None
    static = StaticProduct(kind)
    ways = {
        "torch": lambda: _by_torch(rows, weight, bias, gelu=kind.has_gelu, out=expected),
        "static": lambda: static.run(rows, weight, bias, out),
    }
    took = times_ms(ways, device, repeats=_REPEATS, ahead_cycles=_AHEAD_CYCLES)
    return Comparison(static, took["torch"], took["static"], torch.equal(out, expected))


def kind_of(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, *, gelu: bool = False
) -> DenseKind | None:
    """Return the kind of a product; ``None`` if its tensors are laid out in another way, or it is empty."""
    is_plain = rows.stride(1) == 1 and weight.stride(0) == 1 and out.stride(1) == 1
    if not is_plain or not out.numel() or not rows.numel() or weight.dtype != rows.dtype or out.dtype != rows.dtype:
        return None
    if bias is not None and (bias.ndim != 1 or bias.dtype != rows.dtype or bias.stride(0) != 1):
        return None
    if bias is not None and alignment(bias) < _BIAS_ALIGNMENT:
        return None
    return DenseKind(
        rows.shape[0],
        rows.shape[1],
        weight.shape[1],
        (weight.stride(1), rows.stride(0), out.stride(0)),
        (alignment(weight), alignment(rows), alignment(out), MAX_ALIGNMENT if bias is None else alignment(bias)),
        rows.dtype,
        bias is not None,
        gelu,
    )


def _by_torch(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool, out: torch.Tensor | None
) -> torch.Tensor:
    if not gelu:
        return torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias, rows, weight, out=out)
    if rows.is_cuda and bias is not None:
        if out is None:
            return torch._addmm_activation(bias, rows, weight, use_gelu=True)
        return torch._addmm_activation(bias, rows, weight, use_gelu=True, out=out)
    found = F.gelu(_by_torch(rows, weight, bias, gelu=False, out=None), approximate="tanh")
    return found if out is None else out.copy_(found)


def _note_refused(kind: DenseKind, refused: Refused) -> None:
    logger.info("static product refused kind=%s reason=%s", kind, refused)
    _ways[kind] = None
