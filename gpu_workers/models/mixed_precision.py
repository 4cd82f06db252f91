"""Checkpoints of several dtypes: float32 norms in a bfloat16 model, or any other tensor that was kept wider.

Weights stay as they were lent. A layer that has one of another dtype computes in the widest of its weights and its
input, and returns its input's dtype. torch does the same for norms with float32 weights on the CPU, and refuses most
other mixtures; where it has a way of its own, that one is taken, for the same bits as in the owner's process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that holds all values of these, at least float32 where two halves differ."""
    return reduce(torch.promote_types, dtypes)


def compute_in_widest(module: torch.nn.Module, exceptions: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Make every layer of ``module`` that has one of these parameters compute in the widest dtype of all it has.

    For inference in one thread. Layers take their input as their first argument, by position.
    """
    for path in {target.rpartition(".")[0] for target in exceptions}:
        layer = module.get_submodule(path)
        if device.type == "cpu" and isinstance(layer, torch.nn.GroupNorm) and _is_all_float32(layer, path, exceptions):
            continue
        hooks = _Widened()
        layer.register_forward_pre_hook(hooks.enter)
        layer.register_forward_hook(hooks.leave, always_call=True)


def convolve(x: torch.Tensor, convolution: torch.nn.Conv2d, padding: tuple[int, int]) -> torch.Tensor:
    """Convolve with a layer's weights and other padding, in its widest dtype, as the layer itself does."""
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    if weight.dtype == bias.dtype == x.dtype:
        return F.conv2d(x, weight, bias, padding=padding)
    wide = widest((x.dtype, weight.dtype, bias.dtype))
    return F.conv2d(x.to(wide), weight.to(wide), bias.to(wide), padding=padding).to(x.dtype)


def _is_all_float32(layer: torch.nn.Module, path: str, exceptions: Mapping[str, torch.dtype]) -> bool:
    return all(exceptions.get(f"{path}.{name}") == torch.float32 for name, _ in layer.named_parameters(recurse=False))


class _Widened:
    """One layer: wider copies in the places of its narrower parameters, while it runs."""

    def __init__(self) -> None:
        self._given: torch.dtype | None = None
        self._lent: dict[str, torch.nn.Parameter] = {}

    def enter(self, layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        own = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
        wide = widest([x.dtype, *(parameter.dtype for parameter in own.values())])
        self._given = x.dtype
        self._lent = {name: parameter for name, parameter in own.items() if parameter.dtype != wide}
        for name, parameter in self._lent.items():
            layer._parameters[name] = torch.nn.Parameter(parameter.to(wide), requires_grad=False)
        return (x.to(wide), *others)

    def leave(self, layer: torch.nn.Module, _: Any, result: torch.Tensor | None) -> torch.Tensor | None:
        layer._parameters.update(self._lent)
        self._lent = {}
        return None if result is None or self._given is None else result.to(self._given)
