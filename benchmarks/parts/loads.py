"""What loading a transformer onto a device takes without a daemon, warm from the page cache and cold from the disk.

    python benchmarks/rival_loads.py load-file --files FOLDER --out FILE

``load-file`` is safetensors alone and leaves a state dict, ``single-file`` and ``pretrained`` are diffusers'
``from_single_file`` and ``from_pretrained`` and leave a module. Files come from ``checkpoint_files.py``.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import checkpoint_files
import page_cache
import scales
import torch
from measuring import AnonymousPeak, Report, add_arguments, repeat_ms

SECONDS = 25.0
"""No further warm load begins once those before have taken so long together."""


def load_file(files: Path, device: str) -> tuple[Path, Callable[[], object]]:
    from safetensors.torch import load_file

    path = files / checkpoint_files.CHECKPOINT
    return path, lambda: load_file(path, device=scales.first_of(device))


def single_file(files: Path, device: str) -> tuple[Path, Callable[[], object]]:
    from diffusers import FluxTransformer2DModel

    path = files / checkpoint_files.CHECKPOINT
    config = str(files / checkpoint_files.DIFFUSERS)
    return path, lambda: FluxTransformer2DModel.from_single_file(
        str(path), config=config, subfolder="transformer", **options(device)
    )


def pretrained(files: Path, device: str) -> tuple[Path, Callable[[], object]]:
    from diffusers import FluxTransformer2DModel

    folder = files / checkpoint_files.DIFFUSERS / "transformer"
    weights = folder / "diffusion_pytorch_model.safetensors"
    return weights, lambda: FluxTransformer2DModel.from_pretrained(folder, **options(device))


WAYS = {"load-file": load_file, "single-file": single_file, "pretrained": pretrained}


def options(device: str) -> dict[str, Any]:
    """Straight to the device, which is diffusers' fastest way there."""
    return {
        "torch_dtype": scales.dtype_on(device),
        "device_map": {"": scales.first_of(device)},
        "local_files_only": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("way", choices=tuple(WAYS))
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    report = Report(given.out)
    path, load = WAYS[given.way](given.files, given.device)

    def run() -> None:
        loaded = load()
        if given.device == "cuda":
            torch.cuda.synchronize()
        del loaded

    if given.device == "cuda":
        torch.cuda.init()
    with AnonymousPeak() as peak:
        first_ms = repeat_ms(run, 1)[0]
    report.add(way=given.way, bytes=path.stat().st_size, first_ms=first_ms, anonymous_gib=peak.grown_gib()[0])
    warm: list[float] = []
    while len(warm) < given.repeats and sum(warm) < SECONDS * 1e3:
        gc.collect()  # modules hold themselves in cycles; two of them may not fit
        warm += repeat_ms(run, 1)
        report.add(warm_ms=warm)
    gc.collect()
    reason = page_cache.evict(path)
    report.add(**({"cold_refused": reason} if reason else {"cold_ms": repeat_ms(run, 1)[0]}))


if __name__ == "__main__":
    main()
