"""Products of plain weights in half precision: torch's, or, where as fast, those of cuBLASLt without a workspace.

Both have the same bits, or torch's stays. A kind of product is torch's until :func:`measure_pending` has timed it, once
in the life of the process, so that no forward waits for that.
"""

from __future__ import annotations

import logging
from typing import Final

import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels.cublaslt import DenseKind, Refused, StaticProduct, alignment
from xditd.gpu_workers.kernels.timings import times_ms

logger = logging.getLogger(__name__)

MAX_KINDS: Final = 512
"""Kinds that are remembered; further ones are torch's."""
MAX_PENDING: Final = 32
"""Kinds that are timed at a time."""
_AS_FAST: Final = 1.005
"""The largest ratio of its time to torch's with which a static product is taken. Kernels are timed on a stream, where a
memset costs 1 to 3 us; in CUDA graphs it costs about 7."""
_REPEATS: Final = 3
_AHEAD_CYCLES: Final = 1_000_000
_HALVES: Final = frozenset({torch.bfloat16, torch.float16})

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
    if not rows.is_cuda or rows.dtype not in _HALVES:
        return _by_torch(rows, weight, bias, gelu=gelu, out=out)
    result = rows.new_empty(rows.shape[0], weight.shape[1]) if out is None else out
    kind = _kind_of(rows, weight, bias, result, gelu=gelu)
    if kind is None:
        return _by_torch(rows, weight, bias, gelu=gelu, out=result)
    way = _ways.get(kind)
    if way is None:
        if kind not in _ways and len(_pending) < MAX_PENDING and len(_ways) < MAX_KINDS:
            _pending[kind] = None
        return _by_torch(rows, weight, bias, gelu=gelu, out=result)
    if torch.cuda.is_current_stream_capturing():
        for each in (rows, weight, bias):
            if each is not None:
                each.detach()  # a capture keeps the tensors that it sees in operators of torch
    way.run(rows, weight, bias, result)
    return result


def measure_pending(device: torch.device) -> None:
    """Time the kinds of products that have run since the last call, on random numbers; 10 ms each on one H200."""
    pending = list(_pending)
    _pending.clear()
    for kind in pending:
        try:
            _ways[kind] = _choose(kind, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        except Refused as refused:
            logger.info("static product refused kind=%s reason=%s", kind, refused)
            _ways[kind] = None


def _choose(kind: DenseKind, device: torch.device) -> StaticProduct | None:
    of_weight, of_rows, of_result = kind.strides
    generator = torch.Generator(device).manual_seed(0)

    def numbers(first: int, second: int, stride: int, aligned: int) -> torch.Tensor:
        found = torch.empty((first - 1) * stride + second + _MOST_SHIFT, dtype=kind.dtype, device=device)
        found.normal_(generator=generator)
        shift = 0 if aligned >= _MOST_SHIFT * found.itemsize else aligned // found.itemsize
        return found[shift:].as_strided((first, second), (stride, 1), found.storage_offset() + shift)

    of_alignment = kind.alignments
    weight = numbers(kind.outputs, kind.inputs, of_weight, of_alignment[0]).t()
    rows = numbers(kind.rows, kind.inputs, of_rows, of_alignment[1])
    bias = torch.randn(kind.outputs, dtype=kind.dtype, device=device, generator=generator) if kind.has_bias else None
    out, expected = (numbers(kind.rows, kind.outputs, of_result, of_alignment[2]) for _ in range(2))
    static = StaticProduct(kind)
    _by_torch(rows, weight, bias, gelu=kind.has_gelu, out=expected)
    static.run(rows, weight, bias, out)
    is_same = torch.equal(out, expected)
    ways = {
        "torch": lambda: _by_torch(rows, weight, bias, gelu=kind.has_gelu, out=expected),
        "static": lambda: static.run(rows, weight, bias, out),
    }
    took = times_ms(ways, device, repeats=_REPEATS, ahead_cycles=_AHEAD_CYCLES)
    is_used = is_same and took["static"] <= _AS_FAST * took["torch"]
    logger.debug(
        "product timed rows=%d inputs=%d outputs=%d bias=%s gelu=%s torch_us=%.1f static_us=%.1f same_bits=%s used=%s",
        kind.rows, kind.inputs, kind.outputs, kind.has_bias, kind.has_gelu, took["torch"] * 1e3, took["static"] * 1e3,
        is_same, is_used,
    )  # fmt: skip
    return static if is_used else None


_MOST_SHIFT: Final = 128
"""Elements of 256 bytes, the largest alignment that matters."""


def _kind_of(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, *, gelu: bool
) -> DenseKind | None:
    """Return the kind of a product; ``None`` if its tensors are laid out in another way, or it is empty."""
    is_plain = rows.stride(1) == 1 and weight.stride(0) == 1 and out.stride(1) == 1
    if not is_plain or not out.numel() or not rows.numel() or weight.dtype != rows.dtype or out.dtype != rows.dtype:
        return None
    if bias is not None and (bias.ndim != 1 or bias.dtype != rows.dtype or bias.stride(0) != 1):
        return None
    return DenseKind(
        rows.shape[0],
        rows.shape[1],
        weight.shape[1],
        (weight.stride(1), rows.stride(0), out.stride(0)),
        (alignment(weight), alignment(rows), alignment(out)),
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
