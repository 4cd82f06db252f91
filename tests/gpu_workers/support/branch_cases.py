"""Cases of the kernel that multiplies rows with a weight and adds a branch, against the same in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels.branch_kernels import TILES, Tiles, multiply_with_branch

SHAPES = [(5, 64, 8, 8), (70, 80, 264, 16), (33, 72, 40, 40), (130, 64, 136, 64)]
"""Rows, inputs, outputs, rank."""
DTYPES = [torch.bfloat16, torch.float16]
SMALL_TILES = Tiles(rows=16, columns=32, inputs=16)
"""For the interpreter."""
ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def check_multiply_with_branch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, *, tiles: Tiles = TILES
) -> None:
    """Compare a result within a wider tensor, of rows of a wider one, and what lies beside it."""
    rows, inputs, outputs, rank = shape
    generator = torch.Generator().manual_seed(rows)

    def numbers(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    wide, low, up, bias = numbers(rows, outputs + 24), numbers(rows, rank), numbers(outputs, rank), numbers(outputs)
    x, weight = numbers(rows, inputs + 8)[:, :inputs], numbers(outputs, inputs).t() / inputs**0.5
    before, out = wide.clone(), wide[:, 16 : 16 + outputs]
    exact = x.double() @ weight.double() + bias.double() + low.double() @ up.double().t()
    for gelu in (False, True):
        multiply_with_branch(x, weight, bias, low, up, out, gelu=gelu, tiles=tiles)
        assert torch.equal(wide[:, :16], before[:, :16])
        assert torch.equal(wide[:, 16 + outputs :], before[:, 16 + outputs :])
        expected = F.gelu(exact, approximate="tanh") if gelu else exact
        bound = ROUNDED[dtype] * expected.abs() + (2**-10 * exact.abs() if gelu else 0) + 1e-4
        assert bool(((out.double() - expected).abs() <= bound).all()), (shape, dtype, gelu)
