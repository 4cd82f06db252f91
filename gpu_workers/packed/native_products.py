"""Products of packed weights in eight bits, not dequantised: ``int8``, ``int8_convrot`` and ``float8`` (e4m3).

Each has two steps, so that one quantisation of activations serves several layers: :func:`quantise_int8` and
:func:`multiply_int8`, :func:`quantise_float8` and :func:`multiply_float8`. Results have the dtype of the activations.

``int8``: activations are rotated, if the weight is, and rounded with a scale for each row; sums are exact; so a row's
result does not depend on the others, and splits of tokens keep the bits. On the CPU this has the bits of
comfy-kitchen's eager ``int8_linear``; on GPUs the rotation is more exact, and now and then a number is the next one.

``float8``: with the file's ``input_scale`` as ComfyUI does, by comfy-kitchen: times 1 / scale in the activations'
dtype, at most 448. Without one there is a scale for each row, where ComfyUI takes 1 for all. Sums are those of
``use_fast_accum``, which ComfyUI turns off. The CPU multiplies the rounded numbers in float32.

torch refuses products of few rows: memory is allocated for more rows, whose contents and results are ignored.

Sources: comfy-kitchen 0.2.40, ``backends/eager/quantization.py``, ``tensor/fp8.py``; ComfyUI, ``comfy/ops.py``.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch

from xditd.gpu_workers.kernels import eight_bits, row_kernels
from xditd.gpu_workers.packed.dequantise import hadamard
from xditd.gpu_workers.packed.tensors import PackedTensor

FORMATS: Final = ("int8", "int8_convrot", "float8")
"""The formats that have a native product."""

_TURING: Final = (7, 5)
"""The compute capability from which on tensor cores multiply int8."""
_INT8_STEP: Final = 8
_FLOAT8_STEP: Final = 16
"""The sides of a weight are multiples of these: ``torch._int_mm`` and ``torch._scaled_mm`` refuse others on GPUs."""
_ALIGNMENT: Final = 16
"""Rows of weights on GPUs start at multiples of so many bytes."""
_MOST_COLUMNS: Final = 2**31 // 128**2 - 1
"""With more, a sum of products in eight bits could exceed an int32."""
_INT8_ROWS: Final = 32
"""``torch._int_mm`` refuses fewer than 17 rows; some GPUs want multiples of 32."""


class QuantisedRows(NamedTuple):
    """Activations in eight bits.

    ``values`` is (rows, columns), maybe with more rows than ``leading`` has, which hold anything. ``scales`` is
    float32, one for each row of ``values``, or one for all, without dimensions. ``leading`` are the dimensions before
    the last of the activations, ``dtype`` is theirs.
    """

    values: torch.Tensor
    scales: torch.Tensor
    leading: torch.Size
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return math.prod(self.leading)


def qualifies(packed_format: str, k: int, n: int, device: torch.device) -> str | None:
    """Return why a format has no native product on this device for weights (n, k), or ``None`` if it has one.

    The number of activations does not matter.
    """
    if packed_format not in FORMATS:
        return f"{packed_format} has no native product"
    is_int8 = packed_format != "float8"
    if is_int8 and k > _MOST_COLUMNS:
        return f"{k} columns are more than {_MOST_COLUMNS}"
    if device.type != "cuda":
        return None
    step, least = (_INT8_STEP, _TURING) if is_int8 else (_FLOAT8_STEP, eight_bits.ADA)
    if k % step or n % step:
        return f"the shape [{n}, {k}] is not in multiples of {step}"
    if torch.cuda.get_device_capability(device) < least:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {least[0]}.{least[1]}"
    return None


def memory_fault(weight: torch.Tensor) -> str | None:
    """Return why the memory of a weight in eight bits cannot be multiplied natively, or ``None`` if it can."""
    if weight.stride(1) != 1:
        return "the numbers of a row do not follow each other"
    if weight.is_cuda and (weight.data_ptr() % _ALIGNMENT or weight.stride(0) % _ALIGNMENT):
        return f"its rows do not start at multiples of {_ALIGNMENT} bytes"
    return None


def native_product(x: torch.Tensor, packed: PackedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply activations by a packed weight that has a native product, and add the bias.

    ``x`` (..., columns) gives (..., rows) in the dtype of ``x``. The bias (rows,) may have another dtype.
    """
    if packed.format == "float8":
        return float8_linear(x, packed.values, packed.scale, packed.input_scale, bias)
    assert packed.scale is not None
    return int8_linear(x, packed.values, packed.scale, bias, packed.group)


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, group: int = 0
) -> torch.Tensor:
    """Return ``x`` (..., k) times the transposed weight, int8 (n, k) with one scale or (n, 1): (..., n).

    The result has the dtype of ``x``. ``group`` is that of ``int8_convrot``, else 0.
    """
    return multiply_int8(quantise_int8(x, group), weight, scale, bias)


def quantise_int8(x: torch.Tensor, group: int = 0) -> QuantisedRows:
    """Rotate activations (..., k) in groups of columns, if ``group`` is not 0, and round them to int8 by rows."""
    rows = _matrix(x)
    if x.is_cuda and row_kernels.can_quantise_int8(group, rows.shape[1]):
        values, scales = _memory(rows, torch.int8, _INT8_ROWS)
        row_kernels.quantise_int8(rows, group, values, scales)
        return QuantisedRows(values, scales, x.shape[:-1], x.dtype)
    if group:
        rotation = hadamard(group, x.device).to(x.dtype)
        rows = torch.matmul(rows.view(len(rows), rows.shape[1] // group, group), rotation).view(rows.shape)
    largest = rows.abs().amax(-1) if rows.numel() else rows.new_zeros(rows.shape[0])
    scales = (largest.float() / row_kernels.LARGEST_INT8).clamp(min=row_kernels.TINY_SCALE)
    divisor = scales.to(x.dtype)
    divisor = divisor.masked_fill(divisor == 0, torch.finfo(x.dtype).tiny)
    values = (rows / divisor.unsqueeze(-1)).round_().clamp_(-128.0, 127.0).to(torch.int8)
    if x.is_cuda:
        padded_values, padded_scales = _memory(rows, torch.int8, _INT8_ROWS)
        padded_values[: len(values)], padded_scales[: len(values)] = values, scales
        values, scales = padded_values, padded_scales
    return QuantisedRows(values, scales, x.shape[:-1], x.dtype)


def multiply_int8(
    rows: QuantisedRows, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply quantised activations by the transposed weight, with both scales, and add the bias."""
    count, outputs = rows.rows, weight.shape[0]
    if not count:
        return rows.scales.new_empty((*rows.leading, outputs), dtype=rows.dtype)
    sums = torch._int_mm(rows.values, weight.t())[:count]
    scales, flat = rows.scales[:count], scale.reshape(-1)
    if sums.is_cuda:
        out = torch.empty(count, outputs, dtype=rows.dtype, device=sums.device)
        row_kernels.scale_sums(sums, scales, flat, bias, out)
    else:
        out = (sums.float() * (scales.unsqueeze(-1) * flat.float())).to(rows.dtype)
        out = out if bias is None else out + bias.to(rows.dtype)
    return out.view(*rows.leading, outputs)


def float8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x`` (..., k) times the transposed weight, e4m3 (n, k) with one scale, (n, 1) or none: (..., n).

    The result has the dtype of ``x``. ``input_scale`` is the scale of the file for all of ``x``, float32.
    """
    return multiply_float8(quantise_float8(x, input_scale), weight, scale, bias)


def quantise_float8(x: torch.Tensor, input_scale: torch.Tensor | None = None) -> QuantisedRows:
    """Round activations (..., k) to e4m3, with the file's scale or one for each row."""
    rows = _matrix(x)
    values, scales = _memory(rows, eight_bits.DTYPE, eight_bits.FEWEST_ROWS)
    count = rows.shape[0]
    if input_scale is not None:
        scales = input_scale.float().reshape(())
    if not rows.numel():
        pass
    elif input_scale is not None and x.is_cuda:
        row_kernels.quantise_float8(rows, scales, values)
    elif input_scale is not None:
        largest = eight_bits.LARGEST
        values[:count] = (rows * (1.0 / scales).to(x.dtype)).clamp(-largest, largest).to(values.dtype)
    elif x.is_cuda:
        eight_bits.quantise(rows.contiguous(), out=eight_bits.Quantised(values[:count], scales[:count]))
    else:
        peaks = rows.float().abs().amax(-1).clamp(min=eight_bits.TINY)
        values[:count] = (rows.float() * (eight_bits.LARGEST / peaks).unsqueeze(-1)).to(values.dtype)
        scales[:count] = peaks / eight_bits.LARGEST
    return QuantisedRows(values, scales, x.shape[:-1], x.dtype)


def multiply_float8(
    rows: QuantisedRows, weight: torch.Tensor, scale: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply quantised activations by the transposed weight, with both scales, and add the bias."""
    count, outputs = rows.rows, weight.shape[0]
    bias = bias if bias is None else bias.to(rows.dtype)
    weight_scale = rows.scales.new_ones(()) if scale is None else scale.float()
    if not count:
        return rows.scales.new_empty((*rows.leading, outputs), dtype=rows.dtype)
    is_one_scale = not rows.scales.ndim and weight_scale.numel() == 1
    if rows.values.is_cuda and (is_one_scale or rows.dtype == torch.bfloat16) and rows.dtype != torch.float32:
        out = _scaled_product(rows, weight, weight_scale, bias, is_one_scale)[:count]
        return out.view(*rows.leading, outputs)
    # Row scales need bfloat16 results (torch 2.11), and float32 results take no bias.
    sums = _float32_sums(rows.values, weight)[:count]
    row_scales = rows.scales[:count].unsqueeze(-1) if rows.scales.ndim else rows.scales
    out = (sums.mul_(row_scales).mul_(weight_scale.reshape(-1))).to(rows.dtype)
    return (out if bias is None else out.add_(bias)).view(*rows.leading, outputs)


def _scaled_product(
    rows: QuantisedRows,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    is_one_scale: bool,
) -> torch.Tensor:
    scales: dict[str, Any]
    if is_one_scale:
        scales = {"scale_a": rows.scales, "scale_b": weight_scale.reshape(())}
    else:
        count = rows.values.shape[0]
        row_scales = rows.scales if rows.scales.ndim else rows.scales.expand(count).contiguous()
        columns = weight_scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
        scales = {"scale_a": row_scales.unsqueeze(1), "scale_b": columns}
    return torch._scaled_mm(rows.values, weight.t(), bias=bias, out_dtype=rows.dtype, use_fast_accum=True, **scales)


def _float32_sums(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not values.is_cuda:
        return values.float() @ weight.float().t()
    one = torch.ones((), dtype=torch.float32, device=values.device)
    return torch._scaled_mm(values, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _memory(rows: torch.Tensor, dtype: torch.dtype, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate values and scales; on a GPU for more rows, so that their number is a multiple of ``step``."""
    count, columns = rows.shape
    padded = max(1, -(-count // step)) * step if rows.is_cuda else count
    return (
        torch.empty(padded, columns, dtype=dtype, device=rows.device),
        torch.empty(padded, dtype=torch.float32, device=rows.device),
    )
