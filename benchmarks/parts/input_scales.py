"""Print the errors of native ``float8`` products by the scale of the input: one for each row, and the scale 1.

    python benchmarks/run.py input_scales

ComfyUI takes the scale 1 for files without ``input_scale``. Weights and inputs are normal random numbers (1024 inputs,
512 outputs), the weights rounded to float8. With outliers, every 128th input is 64 times as large. An error is the norm
of the difference from the product of the unrounded inputs in float64, relative to the norm of that product.

Needs: nothing else
"""

from __future__ import annotations

import argparse

import torch
from measuring import Report, print_table

from xditd.gpu_workers.kernels.eight_bits import LARGEST
from xditd.gpu_workers.packed.native_products import float8_linear

SIZES = (0.001, 0.01, 0.1, 1, 10, 100, 1000)
TOKENS, INPUTS, OUTPUTS = 256, 1024, 512
OUTLIER_STEP, OUTLIER_FACTOR = 128, 64
SEED = 0


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def errors(x: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Return the errors of inputs (tokens, inputs), float32, times the transposed weight (outputs, inputs), e4m3."""
    exact = x.double() @ weight.double().T
    with_scale_1 = x.clamp(-LARGEST, LARGEST).to(weight.dtype).double() @ weight.double().T
    return {
        "each row": relative_error(float8_linear(x, weight), exact),
        "scale 1": relative_error(with_scale_1, exact),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(given: argparse.Namespace, report: Report) -> None:
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).to(torch.float8_e4m3fn)
    x = torch.randn(TOKENS, INPUTS, generator=generator)
    with_outliers = x.clone()
    with_outliers[:, ::OUTLIER_STEP] *= OUTLIER_FACTOR
    rows = [("size of inputs", "each row", "scale 1", "outliers: each row", "outliers: scale 1")]
    for size in SIZES:
        found = errors(x * size, weight), errors(with_outliers * size, weight)
        report.add(**{f"inputs of {size}": {"normal": found[0], "outliers": found[1]}})
        rows.append((str(size), *(f"{error:.2g}" for each in found for error in each.values())))
    print_table("", rows)
