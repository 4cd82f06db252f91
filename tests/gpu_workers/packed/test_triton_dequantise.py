"""Packed weights go to the Triton kernels where they can, with the numbers of torch."""

from __future__ import annotations

import pytest
import torch

from xditd.gpu_workers.packed.dequantise import dequantise
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.packed.triton_dequantise import dequantise_by_triton


def weight(packed_format: str, device: str, group: int = 0, shape: tuple[int, ...] = (40, 4096)) -> PackedTensor:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(-127, 128, shape, generator=generator)
    dtype = torch.float8_e4m3fn if packed_format == "float8" else torch.int8
    scale = torch.rand(shape[0], 1, generator=generator).to(device) * 1e-2
    return PackedTensor(packed_format, shape, numbers.to(dtype).to(device), scale, group=group)  # type: ignore[arg-type]


def test_on_the_cpu_torch_dequantises() -> None:
    packed = weight("int8", "cpu")
    assert not dequantise_by_triton(packed, torch.empty(packed.shape))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_those_of_torch(dtype: torch.dtype) -> None:
    for packed in (
        weight("int8", "cuda"),
        weight("float8", "cuda"),
        weight("float8", "cuda").rows(3, 17),
        weight("int8_convrot", "cuda", 256),
        weight("int8_convrot", "cuda", 1024).rows(3, 17),
    ):
        out, expected = (torch.empty(packed.shape, dtype=dtype, device="cuda") for _ in range(2))
        assert dequantise_by_triton(packed, out)
        dequantise(packed, expected)
        if not packed.group:
            assert torch.equal(out, expected)
            continue
        limit = torch.finfo(dtype).eps * expected.abs() + 127 * packed.group * 1e-2 * 2**-24
        assert bool(((out - expected).abs() <= limit).all()), packed.group


@pytest.mark.gpu
def test_what_no_kernel_takes_is_left_to_torch() -> None:
    for packed in (
        weight("int8_convrot", "cuda", 4096),  # sums would be rounded
        weight("nvfp4", "cuda"),
        weight("float8", "cuda", shape=(8, 4, 3, 3)).rows(1, 2),
    ):
        out = torch.empty(packed.shape, device="cuda")
        assert dequantise_by_triton(packed, out) == (packed.format == "float8"), packed.format
