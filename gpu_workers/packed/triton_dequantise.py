"""Dequantise a packed weight by the Triton kernels, where they take its format and its memory."""

from __future__ import annotations

import math

import torch

from xditd.gpu_workers.kernels import gguf_kernels, packed_kernels
from xditd.gpu_workers.packed.dequantise import dequantise
from xditd.gpu_workers.packed.tensors import PackedTensor


def dequantise_fastest(packed: PackedTensor, out: torch.Tensor) -> torch.Tensor:
    """Write the numbers of a packed weight into ``out``, contiguous, by Triton on GPUs or else by torch; return it."""
    return out if dequantise_by_triton(packed, out) else dequantise(packed, out)


def dequantise_by_triton(packed: PackedTensor, out: torch.Tensor) -> bool:
    """Write the numbers of a packed weight into ``out``, contiguous and on a GPU; return whether that was possible.

    Results have the bits of the versions in torch, but for ``int8_convrot``, which ``packed_kernels`` describes.
    """
    matrix = _as_rows(packed)
    if matrix is None or not out.is_cuda:
        return False
    columns = math.prod(packed.shape[1:])
    if packed.format in gguf_kernels.KINDS:
        gguf_kernels.dequantise_gguf(matrix, packed.format, out)
    elif packed.format == "float8":
        packed_kernels.dequantise_float8(matrix, packed.scale, out)
    elif packed.format == "int8" or (
        packed.format == "int8_convrot" and packed_kernels.can_rotate(packed.group, columns)
    ):
        assert packed.scale is not None
        packed_kernels.dequantise_int8(matrix, packed.scale, out, packed.group)
    else:
        return False
    return True


def _as_rows(packed: PackedTensor) -> torch.Tensor | None:
    """Return the values with two dimensions and contiguous rows, if that needs no copy."""
    values = packed.values
    if values.ndim != 2:
        if not values.is_contiguous():
            return None
        values = values.view(values.shape[0] if values.ndim else 1, -1)
    return values if values.stride(1) == 1 or values.shape[1] == 1 else None
