"""Products of fused blocks with packed weights: native ones, or each weight is dequantised when it is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels import triton_kernels
from xditd.gpu_workers.kernels.eight_bits import DTYPE, Quantised
from xditd.gpu_workers.kernels.products import EightBitLinear, EightBitRows, Linear, TensorRows, project_up
from xditd.gpu_workers.packed.linear import PackedMemory
from xditd.gpu_workers.packed.native_products import memory_fault, native_product
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.packed.triton_dequantise import dequantise_fastest

Weights = Mapping[str, torch.Tensor | PackedTensor]
"""The tensors of a checkpoint by name; a layer may be packed or plain."""


class Projection(NamedTuple):
    """A projection: its weight (out, in), packed or plain, and its bias in the compute dtype."""

    weight: PackedTensor | torch.Tensor
    bias: torch.Tensor


class Dequantiser:
    """Gives weights in ``dtype``: plain ones of it as they are, others in the scratch buffer until the next call."""

    def __init__(self, memory: PackedMemory, dtype: torch.dtype) -> None:
        self.scratch = memory.scratch
        self.dtype = dtype
        self._counts = memory.counts

    def __call__(self, weight: PackedTensor | torch.Tensor) -> torch.Tensor:
        if not isinstance(weight, PackedTensor):
            is_same = weight.dtype == self.dtype
            return weight if is_same else self.scratch.view(weight.shape, self.dtype).copy_(weight)
        self._counts.count_reference(weight, "vectors are multiplied with dequantised matrices")
        return dequantise_fastest(weight, self.scratch.view(weight.shape, self.dtype))

    def native(self, rows: torch.Tensor, projection: Projection) -> torch.Tensor | None:
        """Project rows (rows, in) by the native product of a weight: (rows, out), or ``None`` if none was chosen."""
        weight = projection.weight
        if not isinstance(weight, PackedTensor) or weight.native is None:
            return None
        self.count_native(weight.format)
        return weight.native(rows, weight, projection.bias)

    def count_native(self, packed_format: str, products: int = 1) -> None:
        """Count native products."""
        self._counts.count_native(packed_format, products)

    def projection(self, checkpoint: Weights, name: str, rows: slice = slice(None)) -> Projection:
        """Return the projection of this name, or some of its outputs, without dequantising anything."""
        weight, bias = checkpoint[f"{name}.weight"], checkpoint[f"{name}.bias"]
        assert isinstance(bias, torch.Tensor)
        if isinstance(weight, PackedTensor):
            start, stop, _ = rows.indices(weight.shape[0])
            return Projection(weight.rows(start, stop), bias[rows].to(self.dtype))
        return Projection(weight[rows], bias[rows].to(self.dtype))


class _CheckpointProducts:
    """Products of the packed weights of a checkpoint.

    ``largest`` is the most numbers that one weight has: the scratch buffer is reserved for it.
    """

    def __init__(self, dequantiser: Dequantiser, largest: int) -> None:
        self.dequantiser = dequantiser
        self._largest = largest
        self._checkpoint: Weights = {}

    def reserve(self) -> int:
        """Reserve the scratch buffer, and return 0, the bytes of other memory that was allocated.

        Raises:
            torch.OutOfMemoryError: the device has too little memory.
        """
        self.dequantiser.scratch.reserve(self, self._largest * self.dequantiser.dtype.itemsize)
        return 0

    def load(self, checkpoint: Weights) -> None:
        self.reserve()
        self._checkpoint = checkpoint

    def release(self) -> None:
        self._checkpoint = {}
        self.dequantiser.scratch.release(self)


class PackedWeightProducts(_CheckpointProducts, TensorRows):
    """Native products of packed weights where they were chosen, else products of the dequantised weights.

    The latter are those of :class:`~xditd.gpu_workers.kernels.products.SixteenBit`.
    """

    def linear(self, name: str, rows: slice = slice(None)) -> Projection:
        return self.dequantiser.projection(self._checkpoint, name, rows)

    def multiply(self, rows: torch.Tensor, linear: Projection, out: torch.Tensor) -> None:
        done = self.dequantiser.native(rows, linear)
        if done is None:
            torch.addmm(linear.bias, rows, self.dequantiser(linear.weight).t(), out=out)
        else:
            out.copy_(done)

    def plain(self, linear: Projection) -> Linear | None:
        if isinstance(linear.weight, PackedTensor) and linear.weight.native is not None:
            return None
        return Linear(self.dequantiser(linear.weight).t(), linear.bias)

    def mlp(self, rows: torch.Tensor, up: Projection, down: Projection, out: torch.Tensor) -> None:
        self.multiply(self._up(rows, up), down, out)

    def mlp_and_attention(
        self, attended: torch.Tensor, rows: torch.Tensor, up: Projection, second: Projection, out: torch.Tensor
    ) -> None:
        hidden = self._up(rows, up)
        if isinstance(second.weight, PackedTensor) and second.weight.native is not None:
            self.multiply(torch.cat([attended, hidden], dim=1), second, out)
            return
        weight, width = self.dequantiser(second.weight).t(), attended.shape[1]
        torch.addmm(second.bias, attended, weight[:width], out=out)
        out.addmm_(hidden, weight[width:])

    def _up(self, rows: torch.Tensor, up: Projection) -> torch.Tensor:
        done = self.dequantiser.native(rows, up)
        if done is not None:
            return F.gelu(done, approximate="tanh")
        return project_up(rows, Linear(self.dequantiser(up.weight).t(), up.bias))


class Float8Products(_CheckpointProducts, EightBitRows):
    """Native products of ``float8`` weights: norms, GELU and attention give rows in eight bits to the next product.

    For checkpoints of which :meth:`fits` is true.
    """

    @staticmethod
    def fits(weights: Sequence[PackedTensor | torch.Tensor], dtype: torch.dtype) -> bool:
        """Return whether these products run all of the weights.

        All are ``float8`` whose inputs may be rounded, all with the file's scales or all with one for each row, and
        native products were chosen for the larger part: for the others, too, nothing but the product is left to do
        here. Such products give bfloat16 alone (torch 2.11).
        """
        packed = [each for each in weights if isinstance(each, PackedTensor)]
        native = sum(math.prod(each.shape) for each in packed if each.native is native_product)
        is_most = 2 * native > sum(math.prod(each.shape) for each in weights)
        are_alike = len({each.input_scale is None for each in packed}) == 1 and len(packed) == len(weights)
        return dtype == torch.bfloat16 and is_most and are_alike and all(map(_rounds_rows, packed))

    def linear(self, name: str, rows: slice = slice(None)) -> EightBitLinear:
        weight, bias = self.dequantiser.projection(self._checkpoint, name, rows)
        assert isinstance(weight, PackedTensor)
        scale = torch.ones((), device=bias.device) if weight.scale is None else weight.scale.float()
        scales = scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
        input_scale = None if weight.input_scale is None else weight.input_scale.float().repeat(2)
        return EightBitLinear(weight.values.t(), scales, bias, input_scale)

    def multiply(self, rows: Quantised, linear: EightBitLinear, out: torch.Tensor) -> None:
        self.dequantiser.count_native("float8")
        super().multiply(rows, linear, out)

    def mlp(self, rows: Quantised, up: EightBitLinear, down: EightBitLinear, out: torch.Tensor) -> None:
        self.dequantiser.count_native("float8", 2)
        super().mlp(rows, up, down, out)

    def mlp_and_attention(
        self, attended: torch.Tensor, rows: Quantised, up: EightBitLinear, second: EightBitLinear, out: torch.Tensor
    ) -> None:
        self.dequantiser.count_native("float8", 2)
        super().mlp_and_attention(attended, rows, up, second, out)


def _rounds_rows(weight: PackedTensor) -> bool:
    """Return whether the input of a weight may be rounded to e4m3, to be multiplied natively."""
    return weight.values.dtype == DTYPE and weight.quantises_input and memory_fault(weight.values) is None


class PackedMatrices:
    """Multiplies vectors with many matrices, one after the other, as ``triton_kernels.multiply_vectors`` does."""

    def __init__(self, dequantiser: Dequantiser, matrices: Sequence[Projection]) -> None:
        self._dequantiser = dequantiser
        self._matrices = matrices
        self._biases = _addresses([each.bias for each in matrices])
        self._weights: tuple[int, torch.Tensor] | None = None

    def __call__(self, vectors: torch.Tensor, rows: int) -> torch.Tensor:
        """Multiply vectors (vectors, width): (vectors, matrices, ``rows``)."""
        done = []
        for number, each in enumerate(self._matrices):
            weight = self._dequantiser(each.weight)
            place, bias = self._address_of(weight), self._biases[number : number + 1]
            done.append(triton_kernels.multiply_vectors(place, bias, vectors, rows))
        return torch.cat(done, dim=1)

    def _address_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the address of a weight as a tensor: that of the scratch buffer is sent to the device once."""
        if self._weights is None or self._weights[0] != weight.data_ptr():
            self._weights = weight.data_ptr(), _addresses([weight])
        return self._weights[1]


def _addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([each.data_ptr() for each in tensors], dtype=torch.int64).to(tensors[0].device)
