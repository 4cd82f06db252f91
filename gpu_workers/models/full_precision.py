"""Compute text encoders in float32, whatever the dtype of their weights: in float16 T5 overflows.

ComfyUI does the same, so both give the same numbers for the same file. Lent weights stay as they are: each layer uses
float32 copies while it runs, so the extra memory is that of one layer (0.7 GiB for T5-XXL).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def compute_in_float32(layers: Iterable[torch.nn.Module], embeddings: torch.nn.Module | None) -> None:
    """Make ``layers`` compute in float32, and every ``Embedding`` in ``embeddings`` return float32.

    For inference in one thread. With float32 weights nothing is copied and nothing changes.
    """
    for module in embeddings.modules() if embeddings is not None else ():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(_return_float32)
    for layer in layers:
        widened = _WideParameters()
        layer.register_forward_pre_hook(widened.enter)
        layer.register_forward_hook(widened.leave, always_call=True)


def _return_float32(_: torch.nn.Module, __: Any, result: torch.Tensor) -> torch.Tensor:
    return result.float()


class _WideParameters:
    """Hooks that replace half-precision parameters by float32 copies while one layer runs."""

    def __init__(self) -> None:
        self._originals: list[tuple[dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter]] = []

    def enter(self, layer: torch.nn.Module, _: Any) -> None:
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype != torch.float32:
                    self._originals.append((module._parameters, name, parameter))
        for parameters, name, parameter in self._originals:
            parameters[name] = torch.nn.Parameter(parameter.float(), requires_grad=False)

    def leave(self, _: torch.nn.Module, __: Any, ___: Any) -> None:
        for parameters, name, parameter in self._originals:
            parameters[name] = parameter
        self._originals.clear()


def decode_in_float32(model: Any) -> None:
    """Let a decoder of transformers, built on the meta device, compute its layers and rotary frequencies in float32."""
    keep_frequencies(model.rotary_emb)
    compute_in_float32([*model.layers, model.norm], model.embed_tokens)


def keep_frequencies(rotary: Any) -> None:
    """Give a rotary embedding of transformers, built on the meta device, its frequencies, in float32 for good.

    They follow the inputs to their device, which not every version of transformers does by itself.
    """
    # On the meta device this buffer has no values. No buffer: it stays in float32, whatever the weights' dtype.
    with torch.device("cpu"):
        frequencies = type(rotary)(rotary.config).inv_freq
    rotary._buffers.clear()
    rotary.__dict__["inv_freq"] = frequencies.clone()
    rotary.register_forward_pre_hook(_move_frequencies, with_kwargs=True)


def _move_frequencies(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    device = next((each.device for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
    if device is not None:
        rotary.__dict__["inv_freq"] = rotary.inv_freq.to(device)
