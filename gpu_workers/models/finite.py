"""Check that tensors are finite: one kernel for each, one wait for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from xditd.ipc.errors import BadRequest


def magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value, as float32 on the device; NaN or infinite if any value is.

    One kernel for any dtype and memory format, without a temporary tensor.
    """
    return torch.linalg.vector_norm(tensor, math.inf, dtype=torch.float32)


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all values are finite."""
    return all(
        bool(magnitude(torch.view_as_real(each) if each.is_complex() else each).isfinite())
        for each in tensors
        if each.numel() and (each.is_floating_point() or each.is_complex())
    )


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that all values are finite, with one wait for the device.

    Raises:
        BadRequest: names the first tensor that has other values.
    """
    if not tensors:
        return
    found = torch.stack([_finite_if(tensor) for tensor in tensors.values()]).tolist()
    for (name, tensor), value in zip(tensors.items(), found, strict=True):
        if not math.isfinite(value):
            raise BadRequest(f"{name}: some values are not finite in {str(tensor.dtype).removeprefix('torch.')}")


def _finite_if(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float32 number that is finite if all values are."""
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    if tensor.itemsize == 1:  # torch reduces no eight-bit floats
        return magnitude(tensor.float())
    if tensor.dtype == torch.float64:  # of which some are finite, but not in float32
        return tensor.isfinite().all().float().reciprocal()
    return magnitude(tensor)
