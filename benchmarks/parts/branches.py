"""Time ways to add a LoRA's branch to a projection, for the layers of FLUX.1.

    python benchmarks/run.py branches
    python benchmarks/run.py branches --device cpu --small

Prints for each layer, number of tokens and rank milliseconds: of the product alone, with GELU where the layer has it;
of the branch added after it (``addmm_``, then GELU); of the branch written first, to which the product adds itself; of
both in one kernel, and whether a forward takes that; and of ``down x``, which all need.

Needs: a GPU; --device cpu --small is a dry run, without Triton
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measuring import Report, add_device, need_gpus, print_table

from xditd.gpu_workers.kernels.branch_kernels import MAX_RANK, can_multiply, multiply_with_branch
from xditd.gpu_workers.kernels.dense_products import add_product, multiply
from xditd.gpu_workers.kernels.timings import times_ms

LAYERS = {  # (inputs, outputs, has GELU)
    "qkv": (3072, 9216, False),
    "out": (3072, 3072, False),
    "mlp up": (3072, 12288, True),
    "mlp down": (12288, 3072, False),
}
SMALL_LAYERS = {"mlp up": (64, 256, True), "mlp down": (256, 64, False)}
TOKENS, SMALL_TOKENS = (4608, 4096, 2304, 2048, 512), (32,)
RANKS = (16, 64, 128, 512)
DTYPE = torch.bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("branches", 1, given.device)
    device = torch.device(given.device)
    rows: list[tuple[str, ...]] = []
    for name, (inputs, outputs, has_gelu) in (SMALL_LAYERS if given.small else LAYERS).items():
        for tokens in SMALL_TOKENS if given.small else TOKENS:
            for rank in given.ranks:
                took = times_ms(ways_of(tokens, inputs, outputs, rank, device, has_gelu=has_gelu), device)
                label = f"{name}, {tokens} tokens, rank {rank}"
                found: dict[str, Any] = {way: round(each, 4) for way, each in took.items()}
                report.add(**{label: found})
                rows.append((label, ", ".join(f"{way} {each}" for way, each in found.items())))
    print_table("milliseconds", [("layer", "ways"), *rows])


def ways_of(
    tokens: int, inputs: int, outputs: int, rank: int, device: torch.device, *, has_gelu: bool
) -> dict[str, Callable[[], object]]:
    """Return the ways, by name, each with the same tensors."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=device) * shape[-1] ** -0.5

    x, weight, bias = numbers(tokens, inputs), numbers(outputs, inputs).t(), numbers(outputs)
    low, up, out = numbers(tokens, rank), numbers(outputs, rank), numbers(tokens, outputs)
    down = numbers(rank, inputs)

    def after() -> None:
        multiply(x, weight, bias, out=out)
        out.addmm_(low, up.t())
        if has_gelu:
            torch.ops.aten.gelu_(out, approximate="tanh")

    def before() -> None:
        torch.addmm(bias, low, up.t(), out=out)
        add_product(x, weight, out, gelu=has_gelu)

    def one_kernel() -> None:
        multiply_with_branch(x, weight, bias, low, up, out, gelu=has_gelu)

    ways = {"alone": lambda: multiply(x, weight, bias, gelu=has_gelu, out=out), "after": after, "before": before}
    if rank <= MAX_RANK and can_run(device):
        chosen = " (taken)" if can_multiply(x, weight, bias, up, out) else ""
        ways[f"one kernel{chosen}"] = one_kernel
    return ways | {"down x": lambda: torch.mm(x, down.t(), out=low)}


def can_run(device: torch.device) -> bool:
    """Return whether the kernel runs there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
