"""An operator for the products of plain layers in the graphs of compiled blocks (``kernels/dense_products``)."""

from __future__ import annotations

from typing import Final

import torch

from xditd.gpu_workers.kernels.dense_products import multiply

SCHEMA: Final = "dense_product(Tensor rows, Tensor weight, Tensor? bias, bool gelu) -> Tensor"

# Kept for the life of the process: torch removes the operators of a library that is freed.
_LIBRARY: Final = torch.library.Library("xditd", "FRAGMENT")
_LIBRARY.define(SCHEMA)


def _multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    return multiply(rows, weight, bias, gelu=gelu)


def _multiply_fake(rows: torch.Tensor, weight: torch.Tensor, _: torch.Tensor | None, __: bool) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


_LIBRARY.impl("dense_product", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("xditd::dense_product", _multiply_fake, lib=_LIBRARY)

OPERATOR: Final = torch.ops.xditd.dense_product.default
