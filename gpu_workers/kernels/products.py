"""The matrix products of a block, in the checkpoint's own dtype or in eight bits.

Inputs of products are *rows*: a tensor (rows, width) or, in eight bits, ``Quantised``. Results, and everything between
two products, have the checkpoint's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from xditd.gpu_workers.kernels import triton_kernels
from xditd.gpu_workers.kernels.dense_products import multiply
from xditd.gpu_workers.kernels.eight_bits import ADA, DTYPE, FEWEST_ROWS, Quantised, quantise
from xditd.ipc.errors import Unsupported

EIGHT = "fp8"

RowsT = TypeVar("RowsT")
LinearT = TypeVar("LinearT")

TOLERANCE = 0.02
"""Relative error of one forward. In bfloat16 at full size, sums in another order give 1.5e-2, with torch.compile as
with fused kernels (``benchmarks/run.py step_time``); a defect gives 0.1 and more."""

EIGHT_BIT_TOLERANCE = 0.1
"""The same for products in eight bits. In a transformer of 57 blocks they gave 0.056 to 0.060 (rounding emulated in
float32, width 256, random weights), one zeroed projection 0.09 to 0.17: this check finds gross faults alone. Tests
compare each kind of product with a float32 product of the rounded numbers, to 1e-6."""


class Products(Protocol[RowsT, LinearT]):
    """The projections of one checkpoint and their products. ``out`` and results are in the checkpoint's dtype."""

    label: str
    """Name of these products in logs."""
    tolerance: float
    """Largest relative error of one forward against plain modules."""

    def reserve(self) -> int:
        """Allocate memory for weights that :meth:`load` converts; return its bytes, 0 if there are none."""

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Use the weights of this checkpoint until :meth:`release` or the next call.

        They are tensors, or packed in a form that these products know.
        """

    def release(self) -> None:
        """Drop the checkpoint, and free the reserved memory."""

    def linear(self, name: str, rows: slice = slice(None)) -> LinearT:
        """Return the projection of this name, or some of its outputs."""

    def halves(self, rows: RowsT, text_rows: int) -> tuple[RowsT, RowsT]:
        """Return the rows of text and those of images."""

    def modulate(self, x: torch.Tensor, into: tuple[LinearT, LinearT], **given: Any) -> RowsT:
        """Do what ``triton_kernels.add_and_modulate`` does, and return rows for products.

        Those of text and those of images go ``into`` these projections, or others with the same input.
        """

    def take(self, x: torch.Tensor, into: tuple[LinearT, LinearT], text_rows: int) -> RowsT:
        """Make rows of a contiguous tensor, which go ``into`` these projections."""

    def multiply(self, rows: RowsT, linear: LinearT, out: torch.Tensor) -> None:
        """Project rows."""

    def mlp(self, rows: RowsT, up: LinearT, down: LinearT, out: torch.Tensor) -> None:
        """Project up, apply GELU (tanh), project down."""

    def mlp_and_attention(
        self, attended: torch.Tensor, rows: RowsT, up: LinearT, second: LinearT, out: torch.Tensor
    ) -> None:
        """End a single block: ``second`` projects [``attended`` | gelu(up(``rows``))]."""


class Linear(NamedTuple):
    """A projection: its weight transposed, (in, out), and its bias."""

    weight: torch.Tensor
    bias: torch.Tensor


class TensorRows:
    """What products have in common whose rows are plain tensors."""

    label = "fused"
    tolerance = TOLERANCE

    def halves(self, rows: torch.Tensor, text_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rows[:text_rows], rows[text_rows:]

    def modulate(self, x: torch.Tensor, into: object, **given: Any) -> torch.Tensor:  # noqa: ARG002 - not rounded
        return triton_kernels.add_and_modulate(x, **given)

    def take(self, x: torch.Tensor, into: object, text_rows: int) -> torch.Tensor:  # noqa: ARG002 - not rounded
        return x

    def plain(self, linear: Any) -> Linear | None:
        """Return a projection with a weight in the dtype of the rows, valid until the next call.

        ``None``: its product is one of other numbers.
        """
        raise NotImplementedError


class SixteenBit(TensorRows):
    """Products of the lent weights themselves: lossless. (float32 on the CPU, in tests.)

    Two products with GELU in the epilogue of one are faster than a single product with a GELU kernel: the intermediate
    is not written and read once more, and under full load power is the limit.
    """

    def __init__(self) -> None:
        self._checkpoint: Mapping[str, torch.Tensor] = {}

    def reserve(self) -> int:
        return 0

    def load(self, checkpoint: Mapping[str, torch.Tensor]) -> None:
        self._checkpoint = checkpoint

    def release(self) -> None:
        self._checkpoint = {}

    def linear(self, name: str, rows: slice = slice(None)) -> Linear:
        return Linear(self._checkpoint[f"{name}.weight"][rows].t(), self._checkpoint[f"{name}.bias"][rows])

    def multiply(self, rows: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        multiply(rows, linear.weight, linear.bias, out=out)

    def plain(self, linear: Linear) -> Linear:
        return linear

    def mlp(self, rows: torch.Tensor, up: Linear, down: Linear, out: torch.Tensor) -> None:
        self.multiply(project_up(rows, up), down, out)

    def mlp_and_attention(
        self, attended: torch.Tensor, rows: torch.Tensor, up: Linear, second: Linear, out: torch.Tensor
    ) -> None:
        width = attended.shape[1]
        multiply(attended, second.weight[:width], second.bias, out=out)
        out.addmm_(project_up(rows, up), second.weight[width:])


def project_up(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Project and apply GELU (tanh); on GPUs in the epilogue of the product."""
    return multiply(x, linear.weight, linear.bias, gelu=True)


class EightBitLinear(NamedTuple):
    """A projection: its weight in eight bits transposed, (in, out), a scale for each output, (1, out), and its bias.

    ``input_scale``, float32 (2,), is the scale of all rows, written twice, as kernels read it; without it each row has
    its own.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor
    input_scale: torch.Tensor | None = None


class EightBitRows:
    """What products in e4m3 have in common, with a scale for each token and each output, and sums in more bits."""

    label = "fp8"
    tolerance = EIGHT_BIT_TOLERANCE

    def halves(self, rows: Quantised, text_rows: int) -> tuple[Quantised, Quantised]:
        return rows.halves(text_rows)

    def modulate(self, x: torch.Tensor, into: tuple[EightBitLinear, EightBitLinear], **given: Any) -> Quantised:
        return triton_kernels.add_and_modulate_to_eight_bits(x, **given, scales=_input_scales(into))

    def take(self, x: torch.Tensor, into: tuple[EightBitLinear, EightBitLinear], text_rows: int) -> Quantised:
        return quantise(x, scales=_input_scales(into), text_rows=text_rows)

    def multiply(self, rows: Quantised, linear: EightBitLinear, out: torch.Tensor) -> None:
        _multiply(rows, linear, out)

    def mlp(self, rows: Quantised, up: EightBitLinear, down: EightBitLinear, out: torch.Tensor) -> None:
        _multiply(quantise(gelu_of=_multiply(rows, up), scales=_input_scales((down, down))), down, out)

    def mlp_and_attention(
        self, attended: torch.Tensor, rows: Quantised, up: EightBitLinear, second: EightBitLinear, out: torch.Tensor
    ) -> None:
        scales = _input_scales((second, second))
        _multiply(quantise(attended, gelu_of=_multiply(rows, up), scales=scales), second, out)


class EightBit(EightBitRows):
    """Products in eight bits of weights that are not: not lossless.

    The weights are this worker's own copy, half as large as the lent ones, which each :meth:`load` makes.
    ``shapes`` are the projections by name, as (out, in).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self._shapes = shapes
        self._device = device
        self._checkpoint: Mapping[str, torch.Tensor] = {}
        self._memory: Quantised | None = None
        self._weights: dict[str, Quantised] = {}

    def reserve(self) -> int:
        """Allocate one buffer for all weights in eight bits, and one for their scales.

        Raises:
            torch.OutOfMemoryError: the GPU has too little memory.
        """
        if self._memory is None:
            values = sum(rows * columns for rows, columns in self._shapes.values())
            scales = sum(rows for rows, _ in self._shapes.values())
            self._memory = Quantised(
                torch.empty(values, dtype=DTYPE, device=self._device),
                torch.empty(scales, dtype=torch.float32, device=self._device),
            )
            self._weights = dict(self._split_memory(self._memory))
        return sum(part.nbytes for part in self._memory)

    def load(self, checkpoint: Mapping[str, torch.Tensor]) -> None:
        """Quantise the weights of this checkpoint. Afterwards only its biases are read."""
        self.reserve()
        self._checkpoint = checkpoint
        for name, weight in self._weights.items():
            quantise(checkpoint[f"{name}.weight"], out=weight)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the client may change the weights after this returns

    def release(self) -> None:
        self._checkpoint = {}
        if self._memory is not None:
            self._memory, self._weights = None, {}
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # else torch keeps the memory from other programs

    def linear(self, name: str, rows: slice = slice(None)) -> EightBitLinear:
        weight = self._weights[name]
        bias = self._checkpoint[f"{name}.bias"]
        return EightBitLinear(weight.values[rows].t(), weight.scales[rows].unsqueeze(0), bias[rows])

    def _split_memory(self, memory: Quantised) -> Iterator[tuple[str, Quantised]]:
        value = scale = 0
        for name, (rows, columns) in self._shapes.items():
            values = memory.values[value : value + rows * columns].view(rows, columns)
            yield name, Quantised(values, memory.scales[scale : scale + rows])
            value, scale = value + rows * columns, scale + rows


def _input_scales(into: tuple[EightBitLinear, EightBitLinear]) -> torch.Tensor | None:
    """Return the scales of the inputs of two projections, (2,); ``None`` if each row has its own."""
    first, second = (each.input_scale for each in into)
    if first is None or second is None or first is second:
        return first
    return torch.stack((first[0], second[1]))


def check_eight_bits(device: torch.device) -> None:
    """Multiply a few rows in eight bits.

    Raises:
        Unsupported: the GPU or this torch has no such products.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < ADA:
        raise Unsupported(f"precision 'fp8' needs GPUs of compute capability 8.9 or later, not {device}; use bf16")
    width = triton_kernels.HEAD_SIZE
    some = torch.ones(width, width, dtype=torch.bfloat16, device=device)
    try:
        weight = quantise(some)
        linear = EightBitLinear(weight.values.t(), weight.scales.unsqueeze(0), some[0])
        found = _multiply(quantise(some[:3]), linear)
    except (RuntimeError, NotImplementedError) as error:
        raise Unsupported(
            f"precision 'fp8' does not run on {device}: {str(error).splitlines()[0]}; use bf16"
        ) from error
    if not bool((found == width + 1).all()):
        raise Unsupported(f"precision 'fp8' gives {float(found[0, 0])} for {width + 1} on {device}; use bf16")


def _multiply(rows: Quantised, linear: EightBitLinear, out: torch.Tensor | None = None) -> torch.Tensor:
    count = rows.values.shape[0]
    if count < FEWEST_ROWS:
        few = _multiply_many(rows.padded(FEWEST_ROWS), linear)[:count]
        return few if out is None else out.copy_(few)
    return _multiply_many(rows, linear, out)


def _multiply_many(rows: Quantised, linear: EightBitLinear, out: torch.Tensor | None = None) -> torch.Tensor:
    given: dict[str, Any] = {} if out is None else {"out": out}
    return torch._scaled_mm(
        rows.values,
        linear.weight,
        scale_a=rows.scales.unsqueeze(1),
        scale_b=linear.scales,
        bias=linear.bias,
        out_dtype=linear.bias.dtype,
        use_fast_accum=True,
        **given,
    )
