"""Time ways to add a LoRA's branch to a projection, for the layers of FLUX.1.

    python benchmarks/run.py branches
    python benchmarks/run.py branches --device cpu --small

Prints for each layer, number of tokens and rank milliseconds: of the product alone; of the branch added after it
(``addmm_``); of the branch written first, to which the product adds itself. Before GELU: of the product with GELU in
its epilogue; of the branch added after it, then GELU; and of both in one kernel. ``down x`` is part of none.

Needs: a GPU; --device cpu --small is a dry run, without Triton
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measuring import Report, add_device, need_gpus, print_table

from xditd.gpu_workers.kernels.branch_kernels import add_and_gelu
from xditd.gpu_workers.kernels.dense_products import multiply
from xditd.gpu_workers.kernels.timings import times_ms

LAYERS = {  # (inputs, outputs, has GELU)
    "qkv": (3072, 9216, False),
    "linear1": (3072, 21504, False),
    "linear2": (15360, 3072, False),
    "mlp up": (3072, 12288, True),
    "mlp down": (12288, 3072, False),
}
SMALL_LAYERS = {"mlp up": (64, 256, True), "mlp down": (256, 64, False)}
TOKENS, SMALL_TOKENS = (4608, 2304), (32,)
RANKS = (16, 64, 128, 256, 512)
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

    def after() -> None:
        multiply(x, weight, bias, out=out)
        out.addmm_(low, up.t(), alpha=0.8)

    def before() -> None:
        torch.addmm(bias, low, up.t(), alpha=0.8, out=out)
        out.addmm_(x, weight)

    def after_and_gelu() -> None:
        after()
        torch.ops.aten.gelu_(out, approximate="tanh")

    def one_kernel() -> None:
        multiply(x, weight, bias, out=out)
        add_and_gelu(out, low, up, 0.8)

    if not has_gelu:
        return {"alone": lambda: multiply(x, weight, bias, out=out), "after": after, "before": before}
    ways: dict[str, Callable[[], object]] = {
        "alone": lambda: multiply(x, weight, bias, gelu=True, out=out),
        "after": after_and_gelu,
    }
    return ways | {"one kernel": one_kernel} if device.type == "cuda" else ways
