"""Time products of plain layers in bfloat16: torch's, and those of cuBLASLt without a workspace.

    python benchmarks/run.py dense_products
    python benchmarks/run.py dense_products --rows 4608 2304 --json FILE

Prints microseconds of both for the layers of FLUX.1, on random numbers, whether their bits are the same, and which one
compiled and fused blocks take.

Needs: a GPU
"""

from __future__ import annotations

import argparse

import torch
from measuring import Report, need_gpus, print_table

from xditd.gpu_workers.kernels.cublaslt import MAX_ALIGNMENT, DenseKind
from xditd.gpu_workers.kernels.dense_products import compare

LAYERS = {  # (outputs, inputs, whether GELU follows)
    "attention out": (3072, 3072, False),
    "qkv": (9216, 3072, False),
    "mlp up": (12288, 3072, True),
    "mlp down": (3072, 12288, False),
    "single out": (3072, 15360, False),
}
ROWS = (4608, 2560, 2304, 512, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="N", help="tokens")


def run(given: argparse.Namespace, report: Report) -> int:
    need_gpus("dense_products", 1, "cuda")
    table = [("rows", "layer", "torch_us", "static_us", "ratio", "same_bits", "taken")]
    for rows in given.rows:
        for name, (outputs, inputs, has_gelu) in LAYERS.items():
            kind = DenseKind(
                rows, inputs, outputs, (inputs, inputs, outputs), (MAX_ALIGNMENT,) * 4, torch.bfloat16, True, has_gelu
            )
            found = compare(kind, torch.device("cuda", 0))
            each = {
                "torch_us": round(found.torch_ms * 1e3, 1),
                "static_us": round(found.static_ms * 1e3, 1),
                "ratio": round(found.static_ms / found.torch_ms, 3),
                "same_bits": found.is_same,
                "taken": found.is_static_taken,
            }
            report.add(**{f"{name}, {rows} rows": each})
            table.append((str(rows), name, *map(str, each.values())))
    print_table("products of bfloat16, with bias", table)
    return 0
