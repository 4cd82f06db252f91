"""The products of fused FLUX.1 blocks, with the checks of forwards that take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from xditd.gpu_workers.kernels.products import Products
from xditd.gpu_workers.models.fast_path_check import FastPathCheck


class CheckedProducts(NamedTuple):
    """Products, and the checks of blocks with them: by themselves, with LoRAs, and with residuals of ControlNets.

    None of them ends the others.
    """

    products: Products[Any, Any]
    check: FastPathCheck
    lora_check: FastPathCheck
    control_check: FastPathCheck

    @classmethod
    def of(cls, products: Products[Any, Any], module: torch.nn.Module) -> CheckedProducts:
        label = label_of(products)
        return cls(
            products,
            FastPathCheck(label, products.tolerance, module),
            FastPathCheck(f"{label} with LoRAs", products.tolerance, module),
            FastPathCheck(f"{label} with ControlNets", products.tolerance, module),
        )


def label_of(products: Products[Any, Any]) -> str:
    """Return what status calls blocks with these products."""
    return f"{products.label} FLUX.1 blocks"
