"""Load a transformer onto a device without a daemon, warm from the page cache and cold from the disk.

    python benchmarks/run.py loads load-file --files FOLDER

``load-file`` is safetensors alone and leaves a state dict, ``single-file`` and ``pretrained`` are diffusers'
``from_single_file`` and ``from_pretrained`` and leave a module. The suite compares them with lending a file.

Needs: a GPU; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux
import torch
from measuring import Report, add_device, drop_from_page_cache, need_gpus, print_table, repeat_ms
from parts import files

SECONDS = 25.0
"""No further warm load starts after the warm loads took this long together."""


def load_file(given: argparse.Namespace) -> tuple[Path, Callable[[], object]]:
    from safetensors.torch import load_file

    path = given.files / files.CHECKPOINT
    return path, lambda: load_file(path, device=str(flux.device_of(given)))


def single_file(given: argparse.Namespace) -> tuple[Path, Callable[[], object]]:
    from diffusers import FluxTransformer2DModel

    path = given.files / files.CHECKPOINT
    config = str(given.files / files.DIFFUSERS)
    return path, lambda: FluxTransformer2DModel.from_single_file(
        str(path), config=config, subfolder="transformer", **options(given)
    )


def pretrained(given: argparse.Namespace) -> tuple[Path, Callable[[], object]]:
    from diffusers import FluxTransformer2DModel

    folder = given.files / files.DIFFUSERS / "transformer"
    weights = folder / "diffusion_pytorch_model.safetensors"
    return weights, lambda: FluxTransformer2DModel.from_pretrained(folder, **options(given))


WAYS = {"load-file": load_file, "single-file": single_file, "pretrained": pretrained}


def options(given: argparse.Namespace, rank: int = 0) -> dict[str, Any]:
    """Return loader options that load directly to the device, which is diffusers' fastest way."""
    device = str(flux.device_of(given, rank))
    return {"torch_dtype": flux.dtype_on(given.device), "device_map": {"": device}, "local_files_only": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("way", choices=tuple(WAYS))
    add_device(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=Path, required=True, help="folder of the part files, written if needed")


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("loads", 1, given.device)
    files.ensure(given.files, given)
    device = flux.device_of(given)
    path, load = WAYS[given.way](given)

    def once() -> float:
        gc.collect()  # modules are in reference cycles, and two of them may not fit
        return repeat_ms(load, device=device)[0]

    if given.device == "cuda":
        torch.cuda.init()
    report.add(way=given.way, bytes=path.stat().st_size, first_ms=once())
    warm: list[float] = []
    while len(warm) < given.repeats and sum(warm) < SECONDS * 1e3:
        warm.append(once())
        report.add(warm_ms=warm)
    gc.collect()
    reason = drop_from_page_cache(path)
    report.add(**({"cold_refused": reason} if reason else {"cold_ms": once()}))
    print_table(given.way, [(name, str(report.found[name])) for name in ("first_ms", "warm_ms")])
