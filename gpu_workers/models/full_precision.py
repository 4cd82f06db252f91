"""Text encoders compute in float32, whatever their weights are: in half precision T5 overflows, and prompts differ.

ComfyUI does the same, so that both give the same numbers for the same file. Weights stay as they were lent: each layer
sees float32 copies of its own while it runs, so the extra memory is that of one layer (0.7 GiB for T5-XXL).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def compute_in_float32(layers: Iterable[torch.nn.Module], embeddings: torch.nn.Module) -> None:
    """Make ``layers`` compute in float32, and every ``Embedding`` in ``embeddings`` return it.

    For inference in one thread. With float32 weights nothing is copied and nothing changes.
    """
    for module in embeddings.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(_return_float32)
    for layer in layers:
        widened = _Widened()
        layer.register_forward_pre_hook(widened.enter)
        layer.register_forward_hook(widened.leave, always_call=True)


def _return_float32(_: torch.nn.Module, __: Any, result: torch.Tensor) -> torch.Tensor:
    return result.float()


class _Widened:
    """Float32 parameters in the places of half-precision ones, while one layer runs."""

    def __init__(self) -> None:
        self._lent: list[tuple[dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter]] = []

    def enter(self, layer: torch.nn.Module, _: Any) -> None:
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype != torch.float32:
                    self._lent.append((module._parameters, name, parameter))
        for parameters, name, parameter in self._lent:
            parameters[name] = torch.nn.Parameter(parameter.float(), requires_grad=False)

    def leave(self, _: torch.nn.Module, __: Any, ___: Any) -> None:
        for parameters, name, parameter in self._lent:
            parameters[name] = parameter
        self._lent.clear()
