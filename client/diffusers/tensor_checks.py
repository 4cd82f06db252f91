"""Refuse parameters and buffers that cannot be lent: quantised, sparse, and those that only the daemon has."""

from __future__ import annotations

from typing import Final

import torch

from xditd.ipc.errors import Unsupported

_PLAIN: Final = (torch.Tensor, torch.nn.Parameter)


def check_tensors(module: torch.nn.Module, label: str) -> None:
    """Check the parameters and buffers of all submodules.

    Raises:
        Unsupported: a tensor is of a subclass, as quantised weights are, sparse, or a placeholder of a weight that the
            daemon keeps for another module; the error names it and the remedy.
    """
    for path, each in module.named_modules():
        where = f"{label}.{path}" if path else label
        for name, tensor in (*each._parameters.items(), *each._buffers.items()):
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN:
                raise Unsupported(
                    f"{where}.{name} is a {type(tensor).__module__}.{type(tensor).__qualname__}: workers take plain "
                    "tensors only; dequantise the module first (module.dequantize()), or load it without quantisation"
                )
            if tensor.layout is not torch.strided:
                raise Unsupported(
                    f"{where}.{name} has the layout {tensor.layout}: workers take dense tensors; replace it by its "
                    "to_dense()"
                )
            if _is_placeholder(tensor):
                raise Unsupported(
                    f"{where}.{name} is shared with a model whose weights are in the daemon alone (keep='daemon'), and "
                    "has no values here: accelerate both with keep='client', or leave that block first"
                )


def _is_placeholder(tensor: torch.Tensor) -> bool:
    """Return whether this is one NaN, expanded: what ``Placeholders`` puts in place of a parameter."""
    if tensor.numel() < 2 or any(tensor.stride()) or not tensor.is_floating_point() or tensor.is_meta:
        return False
    return bool(tensor[(0,) * tensor.ndim].isnan())
