"""Products by cuBLASLt without a workspace have the bits of torch's, or are not used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels import dense_products
from xditd.gpu_workers.kernels.cublaslt import DenseKind, Refused, StaticProduct
from xditd.gpu_workers.kernels.dense_products import measure_pending, multiply

SHAPES = (
    (2304, 3072, 3072),
    (2304, 3072, 12288),
    (2304, 12288, 3072),
    (256, 3072, 3072),
    (1, 3072, 18432),
    (77, 64, 96),
)


@pytest.fixture(autouse=True)
def _no_kinds() -> Iterator[None]:
    dense_products._ways.clear()
    dense_products._pending.clear()
    yield
    dense_products._ways.clear()


def numbers(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("into", [False, True])
def test_other_devices_have_products_of_torch(gelu: bool, has_bias: bool, into: bool) -> None:
    rows, weight = numbers(5, 8), numbers(6, 8)
    bias = numbers(6) if has_bias else None
    expected = F.linear(rows, weight, bias)
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    out = torch.empty(5, 6) if into else None
    found = multiply(rows, weight.t(), bias, gelu=gelu, out=out)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert out is None or found is out
    assert not dense_products._pending


@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch without CUDA")
def test_a_torch_without_cuda_is_named() -> None:
    kind = DenseKind(5, 8, 6, (8, 8, 6), (256, 256, 256, 256), torch.bfloat16, has_bias=False, has_gelu=False)
    with pytest.raises(Refused, match="no CUDA"):
        StaticProduct(kind)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_kinds_have_the_bits_of_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    count, inputs, outputs = shape
    rows = numbers(count, inputs, device="cuda", dtype=dtype)
    weight = numbers(outputs, inputs, device="cuda", dtype=dtype) / inputs**0.5
    bias = numbers(outputs, device="cuda", dtype=dtype)
    both = torch.empty(count, outputs + 64, device="cuda", dtype=dtype)
    calls = (
        lambda: multiply(rows, weight.t(), bias),
        lambda: multiply(rows, weight.t(), None),
        lambda: multiply(rows, weight.t(), bias, gelu=True),
        lambda: multiply(rows, weight.t(), bias, out=both[:, 64:]),
        lambda: multiply(rows[:, : inputs // 2], weight.t()[: inputs // 2], bias),
        lambda: multiply(rows, weight.t()[:, 8:-5], bias[8:-5]),
        lambda: multiply(rows, weight.t()[:, 1:-7], bias[1:-7]),
    )
    before = [call().clone() for call in calls]
    kinds = len(calls) - 1  # a bias at an odd address is torch's
    assert len(dense_products._pending) == kinds
    measure_pending(torch.device("cuda"))
    assert len(dense_products._ways) == kinds
    for number, (call, expected) in enumerate(zip(calls, before, strict=True)):
        assert torch.equal(call(), expected), number
    exact = F.linear(rows.double(), weight.double(), bias.double())
    error = (before[0].double() - exact).norm() / exact.norm()
    assert float(error) < 4e-3


@pytest.mark.gpu
def test_every_kernel_without_a_workspace_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "_AS_FAST", float("inf"))
    rows, weight, bias = (
        numbers(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((512, 256), (384, 256), (384,))
    )
    expected = multiply(rows, weight.t(), bias, gelu=True)
    measure_pending(torch.device("cuda"))
    (way,) = dense_products._ways.values()
    assert way is not None, "its bits differ from those of torch"
    assert torch.equal(multiply(rows, weight.t(), bias, gelu=True), expected)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        found = multiply(rows, weight.t(), bias, gelu=True)
        graph.capture_end()
    rows.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, multiply(rows, weight.t(), bias, gelu=True))
