"""What the daemon tells a worker group on its command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.degrees import AUTO, parse_layout


@dataclass(frozen=True)
class Options:
    """``workers`` is 0 where the group decides: one a GPU. ``layout`` are the degrees that are asked for by name."""

    runtime_dir: RuntimeDir
    group_token: str
    workers: int
    device: str
    layout: Mapping[str, int]
    attention_backend: str
    kernels: str
    precision: str
    log_level: str


def parse(arguments: Sequence[str]) -> Options:
    """Parse the command line; misuse exits with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m xditd.gpu_workers", description="Lead a group of xDiT workers, one process for each GPU."
    )
    parser.add_argument("--runtime-dir", type=Path, required=True, help="the daemon's private folder")
    parser.add_argument("--group-token", required=True, help="proves that reports belong to this group")
    parser.add_argument("--workers", default="auto", help="how many ranks; auto: one for each GPU, or two on the CPU")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--layout", default=AUTO, help="auto, or degrees such as ulysses=2,ring=2,cfg=2")
    parser.add_argument("--attention-backend", default="auto", help="an xDiT attention backend by name")
    parser.add_argument("--kernels", choices=("auto", "fused", "plain"), default="auto")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16", help="of matrix products")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    given = parser.parse_args(arguments)
    if given.workers != "auto" and (not given.workers.isdecimal() or int(given.workers) < 1):
        parser.error(f"--workers {given.workers}: use auto or a number from 1")
    try:
        layout = parse_layout(given.layout)
    except ValueError as error:
        parser.error(str(error))
    return Options(
        runtime_dir=RuntimeDir(given.runtime_dir),
        group_token=given.group_token,
        workers=0 if given.workers == "auto" else int(given.workers),
        device=given.device,
        layout=layout,
        attention_backend=given.attention_backend,
        kernels=given.kernels,
        precision=given.precision,
        log_level=given.log_level,
    )
