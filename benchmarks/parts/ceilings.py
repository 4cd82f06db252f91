"""Measure the machine's copy rates: pinned host memory to each GPU, to all GPUs at once, and from GPU to GPU.

    python benchmarks/run.py ceilings

The suite compares lends and loads of files with these rates. The copy from GPU to GPU needs a second GPU.

Needs: a GPU; --device cpu copies on the host alone
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measuring import GIB, Report, add_device, need_gpus, print_table, repeat_ms

UPLOAD_BYTES = 4 * GIB
PEER_BYTES = 8 * GIB
SMALL_BYTES = GIB // 4
REPEATS = 7


def upload_gb_s(gpus: list[int], size_bytes: int) -> float:
    """Return the total GB/s from pinned memory to these GPUs at once; each copies from a buffer of its own."""
    sources = [torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True) for _ in gpus]
    targets = [torch.empty(size_bytes, dtype=torch.uint8, device=f"cuda:{gpu}") for gpu in gpus]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
        for gpu in gpus:
            torch.cuda.synchronize(gpu)

    return rate(copy, size_bytes * len(gpus))


def peer_gb_s(source: int, target: int, size_bytes: int) -> float:
    """Return the GB/s of one large copy from GPU to GPU."""
    there = torch.empty(size_bytes, dtype=torch.uint8, device=f"cuda:{source}")
    here = torch.empty(size_bytes, dtype=torch.uint8, device=f"cuda:{target}")

    def copy() -> None:
        here.copy_(there, non_blocking=True)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)

    return rate(copy, size_bytes)


def host_gb_s(size_bytes: int) -> float:
    """Return the GB/s of one copy in host memory."""
    source, target = torch.ones(size_bytes, dtype=torch.uint8), torch.ones(size_bytes, dtype=torch.uint8)
    return rate(lambda: target.copy_(source), size_bytes)


def rate(copy: Callable[[], object], size_bytes: int) -> float:
    """Return the GB/s of the best of several runs."""
    took_ms = repeat_ms(copy, REPEATS, warm_ups=1)  # the first run maps pages and enables peer access
    return size_bytes / min(took_ms) / 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("ceilings", 1, given.device)
    found = {"host_gb_s": host_gb_s(SMALL_BYTES)}
    gpus = list(range(torch.cuda.device_count())) if given.device == "cuda" else []
    uploads, peers = (SMALL_BYTES, SMALL_BYTES) if given.small else (UPLOAD_BYTES, PEER_BYTES)
    for gpu in gpus:
        found[f"upload_{gpu}_gb_s"] = upload_gb_s([gpu], uploads)
    if len(gpus) > 1:
        found |= {"upload_all_gb_s": upload_gb_s(gpus, uploads), "peer_gb_s": peer_gb_s(0, 1, peers)}
    report.add(**found)
    print_table("Copies, the best of several", [(name, f"{rate:.1f} GB/s") for name, rate in found.items()])
