"""Refuse modules whose results a description does not decide."""

from __future__ import annotations

import torch

from xditd.ipc.errors import Unsupported

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def check_submodules(module: torch.nn.Module, label: str) -> None:
    """Check the tensors and the mode of all submodules.

    Raises:
        Unsupported: quantised weights, or dropout in training mode; names the submodule and the remedy.
    """
    for path, each in module.named_modules():
        where = f"{label}.{path}" if path else label
        for name, tensor in (*each._parameters.items(), *each._buffers.items()):
            if tensor is not None and type(tensor) not in _PLAIN:
                raise Unsupported(
                    f"{where}.{name} is a {type(tensor).__module__}.{type(tensor).__qualname__}: workers take plain "
                    "tensors only; dequantise the module first (module.dequantize()), or load it without quantisation"
                )
        if each.training and _drops_values(each):
            raise Unsupported(
                f"{where} is in training mode, and drops random values, which differ in each process: call eval() first"
            )


def _drops_values(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Attention of transformers calls the function, with a number that the module has.
    return any(isinstance(value, float) and value > 0 for name, value in vars(module).items() if "dropout" in name)
