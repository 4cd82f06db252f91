"""A program, not a test: run the kernels around products in eight bits in Triton's interpreter on the CPU.

It ends with status 0 if they have the bits of the versions in torch; where a sum of a rotation comes out otherwise, in
another order, a number may be the next one, and a scale differ in its last bits.
"""

from __future__ import annotations

import mended_interpreter
import torch

mended_interpreter.mend()

from xditd.gpu_workers.kernels import row_kernels  # noqa: E402  # after the interpreter is mended
from xditd.gpu_workers.packed import native_products  # noqa: E402

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
generator = torch.Generator().manual_seed(1)


def given_rows(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows with gaps between them, one of zeros, and one of tiny numbers."""
    x = torch.randn(rows, columns + 8, generator=generator)[:, :columns]
    x[0] = 0
    x[-1] *= 1e-6
    return x.to(dtype)


def check_int8(rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    x = given_rows(rows, columns, dtype)
    expected = native_products.quantise_int8(x, group)
    values, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)
    row_kernels.quantise_int8(x, group, values, scales)
    apart = (values.int() - expected.values.int()).abs()
    label = (rows, columns, group, dtype)
    if group == 0:
        assert int(apart.max()) == 0, label
        assert torch.equal(scales, expected.scales), label
        return
    assert int(apart.max()) <= 1, label
    assert float(apart.float().mean()) < 2e-3, (label, float(apart.float().mean()))
    assert torch.allclose(scales, expected.scales, rtol=4 * torch.finfo(dtype).eps), label


def check_sums(rows: int, columns: int, dtype: torch.dtype) -> None:
    sums = torch.randint(-(2**28), 2**28, (rows, columns), dtype=torch.int32, generator=generator)
    row_scales, scale = torch.rand(rows, generator=generator) * 1e-3, torch.rand(columns, generator=generator) * 1e-4
    bias = torch.randn(columns, generator=generator)
    for scales in (scale, scale[:1], scale.to(torch.bfloat16)):
        for each in (None, bias, bias.to(torch.bfloat16)):
            out = torch.empty(rows, columns, dtype=dtype)
            row_kernels.scale_sums(sums, row_scales, scales, each, out)
            expected = (sums.float() * (row_scales[:, None] * scales.float())).to(dtype)
            expected = expected if each is None else expected + each.to(dtype)
            assert torch.equal(out, expected), (rows, columns, dtype)


def check_float8(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = given_rows(rows, columns, dtype)
    for number in (0.003, 0.1):  # with the first some numbers are too large
        scale = torch.tensor(number)
        values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        row_kernels.quantise_float8(x, scale, values)
        expected = native_products.quantise_float8(x, scale).values
        assert torch.equal(values.float(), expected.float()), (rows, columns, dtype)


for each_dtype in DTYPES:
    for each_group in (0, 4, 16, 64, 256, 1024):
        for width in (1024, 3072):
            check_int8(5, width, each_group, each_dtype)
    check_int8(3, 37, 0, each_dtype)
    check_int8(3, 16, 4, each_dtype)
    check_int8(3, 16, 16, each_dtype)
    for shape in ((5, 3072), (3, 37), (1, 8)):
        check_sums(*shape, each_dtype)
        check_float8(*shape, each_dtype)
