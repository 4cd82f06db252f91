"""Layers that have the same input, such as those of query, key and value: natively it is quantised once for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xditd.gpu_workers.packed import native_products
from xditd.gpu_workers.packed.linear import PackedLinear


def project_all(layers: Sequence[torch.nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Return the result of each layer for ``x`` (..., in), with the bits of separate calls."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    if len(packed) < len(layers) or not _share_rounding(packed):
        return [layer(x) for layer in layers]
    first = packed[0].packed
    if first.format == "float8":
        rows = native_products.quantise_float8(x, first.input_scale)
        return [layer.branches.add(native_products.multiply_float8(rows, *layer.operands()), x) for layer in packed]
    rows = native_products.quantise_int8(x, first.group)
    found = []
    for layer in packed:
        values, scale, bias = layer.operands()
        assert scale is not None
        found.append(layer.branches.add(native_products.multiply_int8(rows, values, scale, bias), x))
    return found


def _share_rounding(layers: Sequence[PackedLinear]) -> bool:
    """Return whether all are multiplied by our own native product, and round their input alike."""
    weights = [layer.packed for layer in layers]
    first = weights[0]
    return all(
        each.native is native_products.native_product
        and (each.format, each.group) == (first.format, first.group)
        and each.input_scale is None
        for each in weights
    )


class WithProjections:
    """An attention layer whose named layers return results that are computed already, whatever they are called with.

    It serves processors of other packages, which call ``layer.to_q(hidden_states)`` and the like once each, with ``x``.
    """

    def __init__(self, layer: torch.nn.Module, names: Sequence[str], x: torch.Tensor) -> None:
        results = project_all([getattr(layer, name) for name in names], x)
        self._layer = layer
        self._results: Mapping[str, torch.Tensor] = dict(zip(names, results, strict=True))

    def __getattr__(self, name: str) -> Any:
        results = self.__dict__["_results"]
        return (lambda _: results[name]) if name in results else getattr(self.__dict__["_layer"], name)
