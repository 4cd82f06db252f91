"""Time products of packed weights and their dequantisers, for the layers of FLUX.1.

    python benchmarks/run.py packed_products
    python benchmarks/run.py packed_products --tiles                    # each kernel with other tiles, too
    python benchmarks/run.py packed_products --device cpu --small

Prints for each layer and number of tokens milliseconds, and the ratio to the bfloat16 product of the same run: that
product, the reference (the weight is dequantised by torch or by Triton, then multiplied) and the native products. Then
the rate of the dequantisers, in GB/s read and written, for each format and layer, and what 12 billion weights take.
Weights are taken in turns from more memory than the caches hold, as in a forward.

Needs: a GPU; --device cpu --small is a dry run, without Triton
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measuring import Report, add_device, need_gpus, print_table, repeat_ms

from xditd.gpu_workers.kernels import gguf_kernels, packed_kernels
from xditd.gpu_workers.packed.dequantise import dequantise
from xditd.gpu_workers.packed.kitchen import kitchen, kitchen_product
from xditd.gpu_workers.packed.native_products import native_product, qualifies
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.packed.triton_dequantise import dequantise_by_triton
from xditd.ipc.packed import GGUF_BLOCKS, PackedFormat

LAYERS = {  # (outputs, inputs)
    "attention out": (3072, 3072),
    "qkv": (9216, 3072),
    "mlp up": (12288, 3072),
    "mlp down": (3072, 12288),
    "single out": (3072, 15360),
}
SMALL_LAYERS = {"attention out": (512, 512), "mlp down": (256, 1024)}
TOKENS, SMALL_TOKENS = (4608, 2304), (64,)
FORMATS: tuple[PackedFormat, ...] = ("int8", "int8_convrot", "float8", "q8_0", "q4_k", "q5_k", "q6_k")
GROUP = 256
WEIGHTS = 12e9
CACHED_BYTES = 192 * 2**20
"""More than the caches of a GPU hold."""
TILES = (1024, 2048, 4096, 8192, 16384)
WARPS = (4, 8)
DTYPE = torch.bfloat16


class Clock:
    """Times calls on a device, several in a row: the host has to be ahead of the GPU, as in a forward."""

    def __init__(self, device: torch.device, repeats: int, in_a_row: int) -> None:
        self._device, self._repeats, self._in_a_row = device, repeats, in_a_row

    def ms(self, action: Callable[[], object]) -> float:
        def run() -> None:
            for _ in range(self._in_a_row):
                action()

        return min(repeat_ms(run, self._repeats, device=self._device, warm_ups=1)) / self._in_a_row


class Weight(NamedTuple):
    """Packed weights of one format and shape, with other values each, and a turn through them."""

    given: list[PackedTensor]
    turn: Iterator[PackedTensor]

    @classmethod
    def random(cls, kind: PackedFormat, shape: tuple[int, int], device: torch.device) -> Weight:
        one = random_weight(kind, shape, device)
        count = max(1, math.ceil(CACHED_BYTES / one.values.nbytes)) if device.type == "cuda" else 1
        given = [one, *(random_weight(kind, shape, device) for _ in range(count - 1))]
        return cls(given, itertools.cycle(given))

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.given[0].tensors)


def random_weight(kind: PackedFormat, shape: tuple[int, int], device: torch.device) -> PackedTensor:
    rows, columns = shape
    if kind in GGUF_BLOCKS:
        block = GGUF_BLOCKS[kind]
        size = rows, columns // block.numbers * block.size_bytes
        # Bytes below 60: as float16 these are scales from 1e-7 to 1.
        return PackedTensor(kind, shape, torch.randint(0, 60, size, dtype=torch.uint8, device=device))
    scale = torch.full((rows, 1), 1e-3, device=device)
    if kind == "float8":
        return PackedTensor(kind, shape, torch.randn(shape, device=device).to(torch.float8_e4m3fn), scale[0, 0])
    values = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    return PackedTensor(kind, shape, values, scale, group=GROUP if kind == "int8_convrot" else 0)


def by_triton(packed: PackedTensor, out: torch.Tensor) -> torch.Tensor:
    assert dequantise_by_triton(packed, out)
    return out


def dequantisers(device: torch.device) -> dict[str, Callable[[PackedTensor, torch.Tensor], torch.Tensor]]:
    return {"torch": dequantise, "triton": by_triton} if device.type == "cuda" else {"torch": dequantise}


def products(
    kind: PackedFormat, weight: Weight, x: torch.Tensor, scratch: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the products of one format by name."""

    def reference(how: Callable[[PackedTensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return F.linear(x, how(next(weight.turn), scratch))

    ways: dict[str, Callable[[], torch.Tensor]] = {
        name: functools.partial(reference, how) for name, how in dequantisers(x.device).items()
    }
    rows, columns = scratch.shape
    if qualifies(kind, columns, rows, x.device) is not None:
        return ways
    ways["native"] = lambda: native_product(x, next(weight.turn), None)
    if kind == "float8":
        scale = torch.full((), 0.02, device=x.device)
        ways["native, input_scale"] = lambda: native_product(x, replace(next(weight.turn), input_scale=scale), None)
    elif x.is_cuda and kitchen() is not None:
        ways["kitchen"] = lambda: kitchen_product(x, next(weight.turn), None)
    return ways


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--tiles", action="store_true", help="time each Triton dequantiser with other tiles and warps")


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("packed_products", 1, given.device)
    device = torch.device(given.device)
    layers, tokens = (SMALL_LAYERS, SMALL_TOKENS) if given.small else (LAYERS, TOKENS)
    clock = Clock(device, *((2, 1) if given.small else (3, 4)))
    found: dict[str, dict[str, float]] = {}
    rates: list[tuple[str, ...]] = [("format", "weight", "by", "ms", "GB/s", "12 B weights")]
    with torch.inference_mode():
        plain = {shape: time_plain(shape, tokens, device, clock) for shape in layers.values()}
        for kind in given.formats:
            rows: list[tuple[str, ...]] = [("layer", "tokens", "bf16 ms", "product", "ms", "of bf16")]
            for name, shape in layers.items():
                weight = Weight.random(kind, shape, device)
                scratch = torch.empty(shape, dtype=DTYPE, device=device)
                for by, how in dequantisers(device).items():
                    one_ms = clock.ms(lambda how=how, weight=weight, scratch=scratch: how(next(weight.turn), scratch))
                    rates.append(rate(kind, shape, by, one_ms, weight.size_bytes + scratch.nbytes))
                for count in tokens:
                    x = torch.randn(count, shape[1], dtype=DTYPE, device=device)
                    bf16 = plain[shape][count]
                    took = {way: clock.ms(action) for way, action in products(kind, weight, x, scratch).items()}
                    found[f"{kind}, {name}, {count} tokens"] = {"bf16": bf16, **took}
                    rows += [
                        (name, str(count), f"{bf16:.3f}", way, f"{ms:.3f}", f"{ms / bf16:.2f}")
                        for way, ms in took.items()
                    ]
            print_table(kind, rows)
            report.add(products=found, dequantisers=[list(each) for each in rates])
        print_table("Dequantisers", rates)
        if given.tiles and device.type == "cuda":
            time_tiles(given.formats, device, clock)


def time_plain(shape: tuple[int, int], tokens: tuple[int, ...], device: torch.device, clock: Clock) -> dict[int, float]:
    """Return the milliseconds of the product with a bfloat16 weight, by the number of tokens."""
    size = math.prod(shape) * DTYPE.itemsize
    count = max(1, math.ceil(CACHED_BYTES / size)) if device.type == "cuda" else 1
    turn = itertools.cycle([torch.randn(shape, dtype=DTYPE, device=device) for _ in range(count)])
    found = {}
    for each in tokens:
        x = torch.randn(each, shape[1], dtype=DTYPE, device=device)
        found[each] = clock.ms(lambda x=x: F.linear(x, next(turn)))
    return found


def rate(kind: str, shape: tuple[int, int], by: str, one_ms: float, moved_bytes: int) -> tuple[str, ...]:
    whole_ms = one_ms * WEIGHTS / math.prod(shape)
    gb_s = moved_bytes / one_ms / 1e6
    return kind, "x".join(map(str, shape)), by, f"{one_ms:.3f}", f"{gb_s:.0f}", f"{whole_ms:.1f} ms"


def time_tiles(formats: tuple[PackedFormat, ...], device: torch.device, clock: Clock) -> None:
    """Print the rate of each Triton dequantiser with each size of tiles and each number of warps."""
    shape = LAYERS["mlp up"]
    scratch = torch.empty(shape, dtype=DTYPE, device=device)
    rows: list[tuple[str, ...]] = [("format", "numbers", "warps", "ms", "GB/s")]
    for kind in formats:
        weight = Weight.random(kind, shape, device)
        for numbers, warps in itertools.product(TILES, WARPS):
            for module, names in (
                (packed_kernels, ("TILE_NUMBERS", "ROTATED_NUMBERS")),
                (gguf_kernels, ("TILE_NUMBERS",)),
            ):
                any_module: Any = module
                any_module.WARPS = warps
                for name in names:
                    setattr(any_module, name, numbers)
            one_ms = clock.ms(lambda weight=weight: by_triton(next(weight.turn), scratch))
            moved = weight.size_bytes + scratch.nbytes
            rows.append((kind, str(numbers), str(warps), f"{one_ms:.3f}", f"{moved / one_ms / 1e6:.0f}"))
    print_table("Tiles of the Triton dequantisers", rows)
