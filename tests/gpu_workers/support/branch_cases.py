"""Cases of the kernel that adds a branch and applies GELU, against the same in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels.branch_kernels import add_and_gelu

SHAPES = [(5, 7, 3), (64, 128, 16), (70, 260, 40), (130, 129, 130)]
"""Rows, columns, rank."""
DTYPES = [torch.bfloat16, torch.float16]
ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def check_add_and_gelu(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Compare a result within a wider tensor, and what lies beside it."""
    rows, columns, rank = shape
    generator = torch.Generator().manual_seed(rows)

    def numbers(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    wide, low, up = numbers(rows, columns + 24), numbers(rows, rank), numbers(columns, rank)
    before, out = wide.clone(), wide[:, 16 : 16 + columns]
    exact = out.double() + -0.3 * (low.double() @ up.double().t())
    expected = F.gelu(exact, approximate="tanh")
    add_and_gelu(out, low, up, -0.3)
    assert torch.equal(wide[:, :16], before[:, :16])
    assert torch.equal(wide[:, 16 + columns :], before[:, 16 + columns :])
    bound = ROUNDED[dtype] * expected.abs() + 1e-4
    assert bool(((out.double() - expected).abs() <= bound).all()), (shape, dtype)
