"""Run checkpoints of several dtypes, such as float32 norms in a bfloat16 model.

Lent weights stay as they are. A layer with a weight of another dtype computes in the widest dtype of its weights and
input, and returns its input's dtype. Norms with float32 weights on the CPU are left to torch, which does the same, for
the same bits as in the client's process; it refuses most other mixtures. Parts that the module's class keeps in float32
(``_keep_in_fp32_modules``) get no hooks if all of their weights are float32: the class casts their inputs itself, and
only blocks without hooks can be compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from xditd.gpu_workers.models.pretrained import kept_in_float32


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that holds all values of these: float32 for float16 with bfloat16."""
    return reduce(torch.promote_types, dtypes)


def compute_in_widest(module: torch.nn.Module, exceptions: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Make every layer of ``module`` with one of these parameters compute in the widest dtype of its parameters.

    For inference in one thread. Layers take their input as their first argument, by position. A module with layers of
    its own that reads a parameter besides them, such as a block its modulation, is left as it is: the class promotes.
    """
    kept = kept_in_float32(type(module))
    for path in {target.rpartition(".")[0] for target in exceptions}:
        layer = module.get_submodule(path)
        if next(layer.children(), None) is not None or _is_kept_part(module, path, kept, exceptions):
            continue
        if device.type == "cpu" and isinstance(layer, torch.nn.GroupNorm) and _is_all_float32(layer, path, exceptions):
            continue
        hooks = _WideParameters()
        layer.register_forward_pre_hook(hooks.enter)
        layer.register_forward_hook(hooks.leave, always_call=True)


def convolve(x: torch.Tensor, convolution: torch.nn.Conv2d, padding: tuple[int, int]) -> torch.Tensor:
    """Convolve with a layer's weights and this padding, in its widest dtype, as the layer itself does."""
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    if weight.dtype == bias.dtype == x.dtype:
        return F.conv2d(x, weight, bias, padding=padding)
    wide = widest((x.dtype, weight.dtype, bias.dtype))
    return F.conv2d(x.to(wide), weight.to(wide), bias.to(wide), padding=padding).to(x.dtype)


def _is_kept_part(
    module: torch.nn.Module, path: str, kept: Sequence[str], exceptions: Mapping[str, torch.dtype]
) -> bool:
    """Return whether a layer is in a part that the class keeps in float32, and all parameters of the part are float32.

    ``kept`` are the names of such parts.
    """
    names = path.split(".")
    for number, name in enumerate(names, 1):
        if name in kept:
            part = ".".join(names[:number])
            own = module.get_submodule(part).named_parameters(part)
            return all(exceptions.get(target) == torch.float32 for target, _ in own)
    return False


def _is_all_float32(layer: torch.nn.Module, path: str, exceptions: Mapping[str, torch.dtype]) -> bool:
    return all(exceptions.get(f"{path}.{name}") == torch.float32 for name, _ in layer.named_parameters(recurse=False))


class _WideParameters:
    """Hooks that replace the narrower parameters of a layer by wider copies while it runs."""

    def __init__(self) -> None:
        self._input_dtype: torch.dtype | None = None
        self._originals: dict[str, torch.nn.Parameter] = {}

    def enter(self, layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        own = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
        wide = widest([x.dtype, *(parameter.dtype for parameter in own.values())])
        self._input_dtype = x.dtype
        self._originals = {name: parameter for name, parameter in own.items() if parameter.dtype != wide}
        for name, parameter in self._originals.items():
            layer._parameters[name] = torch.nn.Parameter(parameter.to(wide), requires_grad=False)
        return (x.to(wide), *others)

    def leave(self, layer: torch.nn.Module, _: Any, result: torch.Tensor | None) -> torch.Tensor | None:
        layer._parameters.update(self._originals)
        self._originals = {}
        return None if result is None or self._input_dtype is None else result.to(self._input_dtype)
