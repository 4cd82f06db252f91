"""Cases of the kernels that dequantise packed weights, with references that follow the formats' definitions.

Used on GPUs by the tests, and in Triton's interpreter on the CPU by ``interpreted_packed.py``.
"""

from __future__ import annotations

import numpy
import torch

from xditd.gpu_workers.kernels import gguf_kernels, packed_kernels
from xditd.ipc.packed import GGUF_BLOCKS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (4, 16, 64, 256, 1024)
SHAPES = ((5, 3072), (1, 2048), (33, 1024))
ODD_SHAPES = ((5, 37), (3, 1), (17, 1025))


def views(whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a tensor of rows as it is, some of its rows, and the same numbers with gaps between rows."""
    rows, columns = whole.shape
    spread = torch.zeros(rows, columns + 6, dtype=torch.uint8, device=whole.device).view(whole.dtype)
    spread[:, 3 : 3 + columns] = whole
    return {"whole": whole, "rows": whole[rows // 3 :], "strided, unaligned": spread[:, 3 : 3 + columns]}


def hadamard(size: int) -> torch.Tensor:
    """Return the regular Hadamard matrix of this size in float64, symmetric and orthogonal."""
    smallest = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    found = smallest
    while found.shape[0] < size:
        found = torch.kron(found, smallest)
    return found / size**0.5


def rotated(numbers: torch.Tensor, group: int) -> torch.Tensor:
    return (numbers.reshape(-1, group) @ hadamard(group).to(numbers)).view(numbers.shape)


def random_int8(rows: int, columns: int, device: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values that include -128 and 127 in whole groups, whose sums are the largest there are; and scales."""
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    values[0], values[rows // 2] = -128, 127
    scale = torch.rand(rows, 1, generator=generator) * 0.01
    return values.to(device), scale.to(device)


def check_int8(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    values, scale = random_int8(*shape, device, torch.Generator().manual_seed(1))
    for label, given in views(values).items():
        first = values.shape[0] - given.shape[0]
        for scales in (scale[first:], scale[0, 0], scale[first:].to(torch.bfloat16), scale[:1]):
            out = torch.full(given.shape, 7.0, dtype=dtype, device=device)
            packed_kernels.dequantise_int8(given, scales, out)
            assert torch.equal(out, (given.float() * scales.float()).to(dtype)), (label, shape, dtype)


def check_rotated(group: int, rows: int, dtype: torch.dtype, device: str) -> None:
    """Exact sums, one rounding to float32, one to the dtype; within one rounding of the version in torch."""
    columns = max(group, 16) * 3
    values, scale = random_int8(rows, columns, device, torch.Generator().manual_seed(2))
    for label, given in views(values).items():
        scales = scale[rows - given.shape[0] :]
        out = torch.full(given.shape, 7.0, dtype=dtype, device=device)
        packed_kernels.dequantise_int8(given, scales, out, group)
        exact = rotated(given.cpu().double(), group) * scales.cpu().double()
        assert torch.equal(out.cpu(), exact.float().to(dtype)), (label, group, rows, dtype)
        wide = rotated(given.cpu().float() * scales.cpu(), group)
        rounding = torch.finfo(dtype).eps * wide.abs() + group * 128 * scales.cpu() * 2**-24
        assert bool(((out.cpu().float() - wide.to(dtype).float()).abs() <= rounding).all()), (label, group, dtype)


def check_float8(kind: torch.dtype, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    rows, columns = shape
    bits = torch.arange(rows * columns).remainder(256).to(torch.uint8).view(shape)
    values = bits.to(device).view(kind)
    scale = (torch.rand(rows, 1, generator=torch.Generator().manual_seed(3)) + 0.5).to(device)
    for label, given in views(values).items():
        for scales in (None, scale[rows - given.shape[0] :], scale[0, 0]):
            out = torch.full(given.shape, 7.0, dtype=dtype, device=device)
            packed_kernels.dequantise_float8(given, scales, out)
            expected = given.to(dtype)
            if scales is not None:
                expected = expected * scales.to(dtype)
            assert torch.equal(out.isnan(), expected.isnan()), (label, kind, dtype)
            assert torch.equal(out.nan_to_num(), expected.nan_to_num()), (label, kind, dtype)


def random_blocks(kind: str, rows: int, blocks: int, generator: torch.Generator) -> torch.Tensor:
    """Return blocks with any bits, but scales that are finite."""
    size = GGUF_BLOCKS[kind].size_bytes
    found = torch.randint(0, 256, (rows * blocks, size), dtype=torch.uint8, generator=generator)
    for at in {"q8_0": (0,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}[kind]:
        scales = (torch.randn(rows * blocks, generator=generator) * 0.01).to(torch.float16)
        scales[0] = 1e-6  # not normal in float16
        found[:, at : at + 2] = scales.view(-1, 1).view(torch.uint8)
    return found.view(rows, blocks * size)


def block_numbers(kind: str, block: bytes) -> list[numpy.float32]:
    """Return the numbers of one block, one at a time, as ggml's ``dequantize_row`` functions do."""
    f32 = numpy.float32

    def half(at: int) -> numpy.float32:
        return f32(numpy.frombuffer(block[at : at + 2], dtype=numpy.float16)[0])

    def signed(byte: int) -> int:
        return byte - 256 if byte > 127 else byte

    if kind == "q8_0":
        return [f32(signed(block[2 + at])) * half(0) for at in range(32)]
    found = []
    if kind in ("q4_k", "q5_k"):
        scales, numbers = block[4:16], block[-128:]
        for at in range(256):
            part = at // 32
            if part < 4:
                scale, offset = scales[part] & 63, scales[part + 4] & 63
            else:
                scale = (scales[part + 4] & 15) | ((scales[part - 4] >> 6) << 4)
                offset = (scales[part + 4] >> 4) | ((scales[part] >> 6) << 4)
            number = (numbers[at // 64 * 32 + at % 32] >> (4 * (part % 2))) & 15
            if kind == "q5_k":
                number += ((block[16 + at % 32] >> part) & 1) << 4
            found.append(half(0) * f32(scale) * f32(number) - half(2) * f32(offset))
        return found
    for at in range(256):
        half_block, rest = divmod(at, 128)
        low = (block[half_block * 64 + rest % 64] >> (4 * (rest // 64))) & 15
        high = (block[128 + half_block * 32 + rest % 32] >> (2 * (rest // 32))) & 3
        scale = half(208) * f32(signed(block[192 + at // 16]))
        found.append(scale * f32((low | high << 4) - 32))
    return found


def check_gguf(kind: str, rows: int, blocks: int, device: str) -> None:
    whole = random_blocks(kind, rows, blocks, torch.Generator().manual_seed(4))
    size = GGUF_BLOCKS[kind].size_bytes
    numbers = [block_numbers(kind, bytes(block.tolist())) for block in whole.view(-1, size)]
    expected = torch.tensor(numpy.array(numbers)).view(rows, -1)
    for label, given in views(whole.to(device)).items():
        for dtype in DTYPES:
            out = torch.full((given.shape[0], expected.shape[1]), 7.0, dtype=dtype, device=device)
            gguf_kernels.dequantise_gguf(given, kind, out)
            wanted = expected[rows - given.shape[0] :].to(dtype)
            assert torch.equal(out.cpu(), wanted), (label, kind, dtype)


def check_empty(device: str) -> None:
    packed_kernels.dequantise_int8(
        torch.empty(0, 256, dtype=torch.int8, device=device),
        torch.empty(0, 1, device=device),
        torch.empty(0, 256, device=device),
        256,
    )
    packed_kernels.dequantise_float8(
        torch.empty(0, 3, dtype=torch.float8_e4m3fn, device=device), None, torch.empty(0, 3, device=device)
    )
    gguf_kernels.dequantise_gguf(
        torch.empty(0, 34, dtype=torch.uint8, device=device), "q8_0", torch.empty(0, 32, device=device)
    )
