"""Products in eight bits: those of comfy-kitchen, the same bits under splits of tokens, and close to the exact ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xditd.gpu_workers.packed import native_products
from xditd.gpu_workers.packed.native_products import float8_linear, int8_linear, multiply_int8, qualifies, quantise_int8

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (0, 16, 256)


def int8_case(
    rows: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return activations with a column of large numbers, a weight with its scales, and a bias."""
    k, n = 512, 768
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, k, generator=generator)
    x[:, 7] *= 20
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, 1, generator=generator) * 1e-3 + 1e-5
    bias = torch.randn(n, generator=generator)
    return x.to(dtype).to(device), weight.to(device), scale.to(device), bias.to(dtype).to(device)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_product_of_comfy_kitchen(group: int, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x, weight, scale, bias = int8_case(67, dtype)
    for scales in (scale, scale[0, 0]):
        for each in (None, bias):
            expected = quantization.int8_linear(x, weight, scales, each, dtype, bool(group), group or 256)
            found = int8_linear(x, weight, scales, each, group)
            assert found.dtype == dtype
            assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("group", GROUPS)
def test_int8_is_what_its_formula_says(group: int) -> None:
    x, weight, scale, bias = int8_case(9, torch.float32)
    turned = x
    if group:
        matrix = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
        rotation = torch.ones(1, 1)
        while rotation.shape[0] < group:
            rotation = torch.kron(rotation, matrix)
        turned = (x.view(9, -1, group) @ rotation).view(x.shape)
    scales = turned.abs().amax(1, keepdim=True) / 127
    rounded = (turned / scales).round()
    expected = (rounded.double() @ weight.double().T) * scales * scale.T + bias
    assert relative(int8_linear(x, weight, scale, bias, group), expected) < 1e-6
    exact = turned.double() @ (weight.double() * scale).T + bias
    assert relative(int8_linear(x, weight, scale, bias, group), exact) < (0.015 if group else 0.06)


def check_splits(device: str) -> None:
    for dtype in DTYPES:
        for group in GROUPS:
            x, weight, scale, bias = int8_case(67, dtype, device=device)
            if device == "cpu":
                x = (
                    x * 32
                ).round() / 32  # sums of a rotation are exact: some processors add up one row in another order
            whole = int8_linear(x, weight, scale, bias, group)
            for sizes in ((33, 34), (1, 66), (1, 2, 64), (16, 17, 34)):
                parts = [int8_linear(part, weight, scale, bias, group) for part in x.split(sizes)]
                assert torch.equal(torch.cat(parts), whole), (dtype, group, sizes)
            halves = [
                int8_linear(x, weight[part], scale[part], bias[part], group) for part in (slice(384), slice(384, 768))
            ]
            assert torch.equal(torch.cat(halves, dim=1), whole), (dtype, group)


def test_splits_of_tokens_and_of_outputs_keep_the_bits_of_int8() -> None:
    check_splits("cpu")


def test_one_quantisation_serves_several_layers_and_any_leading_dimensions() -> None:
    x, weight, scale, bias = int8_case(24, torch.bfloat16)
    rows = quantise_int8(x.view(2, 3, 4, -1), 256)
    for part in (slice(256), slice(256, 768)):
        found = multiply_int8(rows, weight[part], scale[part], bias[part])
        assert found.shape == (2, 3, 4, part.stop - (part.start or 0))
        assert torch.equal(found.flatten(0, 2), int8_linear(x, weight[part], scale[part], bias[part], 256))
    values = x.to(torch.float8_e4m3fn).float()
    eight = native_products.quantise_float8(values.view(4, 6, -1))
    assert native_products.multiply_float8(eight, weight.to(torch.float8_e4m3fn)).shape == (4, 6, 768)


def test_rows_of_zeros_and_no_rows_have_results() -> None:
    x, weight, scale, bias = int8_case(4, torch.bfloat16)
    assert torch.equal(int8_linear(x * 0, weight, scale, bias, 256), bias.expand(4, -1))
    assert int8_linear(x[:0].view(0, 2, 512), weight, scale, bias, 256).shape == (0, 2, 768)
    eight = weight.to(torch.float8_e4m3fn)
    assert torch.equal(float8_linear(x * 0, eight, scale[0, 0], None, bias), bias.expand(4, -1))
    assert float8_linear(x[:0], eight, scale[0, 0], scale[0, 0], bias).shape == (0, 768)


def float8_case(rows: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 512, generator=generator)
    weight = (torch.randn(768, 512, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    bias = torch.randn(768, generator=generator)
    return x.to(dtype).to(device), weight.to(device), bias.to(dtype).to(device)


def check_float8(dtype: torch.dtype, device: str, rows: int) -> None:
    x, weight, bias = float8_case(rows, dtype, device)
    one = torch.tensor(0.0007, device=device)
    each = torch.linspace(0.0005, 0.001, 768, device=device).unsqueeze(1)
    for scale in (None, one, each):
        numbers = weight.double() * (1.0 if scale is None else scale.double())
        for input_scale in (None, torch.tensor(0.02, device=device)):
            found = float8_linear(x, weight, scale, input_scale, bias)
            assert found.dtype == dtype
            expected = x.double() @ numbers.T + bias.double()
            assert relative(found, expected) < 0.04, (scale, input_scale)
            if input_scale is None:
                peaks = x.float().abs().amax(1, keepdim=True)
                rounded = (x.float() * (448 / peaks)).to(torch.float8_e4m3fn).double() * (peaks / 448).double()
            else:
                wide = (x * (1.0 / input_scale).to(dtype)).clamp(-448, 448)
                rounded = wide.to(torch.float8_e4m3fn).double() * input_scale.double()
            # One rounding, and on a GPU that of fast sums.
            limit = 5e-3 if device == "cuda" else 4e-3 if dtype == torch.bfloat16 else 1e-3
            assert relative(found, rounded @ numbers.T + bias.double()) < limit, (scale, input_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_is_the_product_of_rounded_numbers(dtype: torch.dtype) -> None:
    check_float8(dtype, "cpu", 5)


@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
@pytest.mark.parametrize(
    ("size", "with_scale_1"),
    [(0.001, (0.4, 0.6)), (0.01, (0.04, 0.06)), (0.1, (0.02, 0.03)), (1, (0.02, 0.03)), (1000, (0.6, 1))],
)
def test_float8_without_an_input_scale_is_nearer_to_the_exact_product_than_with_the_scale_1(
    size: float, with_scale_1: tuple[float, float], *, outliers: bool
) -> None:
    """ComfyUI takes the scale 1: small inputs lose their digits, and larger ones than 448 are cut off.

    The figures are those of docs/formats.md. In ``outliers`` every 128th column is 64 times as large.
    """
    x, weight, _ = float8_case(32, torch.float32)
    x *= size
    if outliers:
        x[:, ::128] *= 64
    exact = x.double() @ weight.double().T
    found = relative(float8_linear(x, weight), exact)
    stock = relative(x.clamp(-448, 448).to(torch.float8_e4m3fn).double() @ weight.double().T, exact)
    assert found < 0.028
    assert found <= stock
    if not outliers:
        assert with_scale_1[0] < stock < with_scale_1[1]


def test_float8_with_an_input_scale_rounds_as_comfy_kitchen() -> None:
    quantization = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x, _, _ = float8_case(40, torch.bfloat16)
    scale = torch.tensor(0.003)  # some numbers are too large for it
    expected = quantization.quantize_per_tensor_fp8(x, scale)
    found = native_products.quantise_float8(x, scale)
    assert torch.equal(found.values.view(torch.uint8), expected.view(torch.uint8))


def test_what_has_no_native_product_is_said() -> None:
    assert qualifies("int8", 512, 768, CPU) is None
    assert qualifies("q4_k", 512, 768, CPU) == "q4_k has no native product"
    assert qualifies("int8", 2**17, 768, CPU) == "131072 columns are more than 131071"
    assert native_products.memory_fault(torch.zeros(16, 16)[:, :8]) is None
    assert native_products.memory_fault(torch.zeros(16, 16).t()) == "the numbers of a row do not follow each other"


@pytest.mark.slow
def test_the_kernels_around_products_have_the_bits_of_torch_in_the_interpreter() -> None:
    here = Path(__file__)
    environment = os.environ | {"PYTHONPATH": str(here.parents[1] / "support"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(here.with_name("interpreted_rows.py"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
def test_splits_keep_the_bits_of_int8_on_a_gpu() -> None:
    check_splits("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 67, 1024])
def test_int8_on_a_gpu_is_that_of_the_cpu(group: int, dtype: torch.dtype, rows: int) -> None:
    """Apart from numbers that another order of sums rounds to their neighbours."""
    x, weight, scale, bias = int8_case(rows, dtype, device="cuda")
    here = quantise_int8(x.cpu(), group)
    there = quantise_int8(x, group)
    apart = (there.values[:rows].cpu().int() - here.values.int()).abs()
    assert int(apart.max()) <= 1
    assert float(apart.float().mean()) < (1e-3 if group else 1e-9)
    found = multiply_int8(there, weight, scale, bias)
    same = there._replace(values=there.values[:rows].cpu(), scales=there.scales[:rows].cpu())
    expected = multiply_int8(same, weight.cpu(), scale.cpu(), bias.cpu())
    # In float32 Triton adds the bias without rounding the scaled sum before.
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 67, 1024])
def test_float8_on_a_gpu_is_the_product_of_rounded_numbers(dtype: torch.dtype, rows: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs products in float8")
    check_float8(dtype, "cuda", rows)
    unaligned = torch.zeros(32, 40, dtype=torch.uint8, device="cuda")[:, 8:]
    assert native_products.memory_fault(unaligned) == "its rows do not start at multiples of 16 bytes"
    assert "multiples of 16" in str(qualifies("float8", 520, 768, torch.device("cuda")))
    assert "multiples of 8" in str(qualifies("int8", 514, 768, torch.device("cuda")))
