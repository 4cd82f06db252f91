"""Decoding FLUX.1's VAE at full size by each way, side by side in one run, without a daemon.

    python benchmarks/vae_time.py --ranks 1 2

``diffusers`` is one rank's decode as diffusers runs it, ``channels_last`` the same with activations in that memory
format, ``bands`` the decoder of ``split_decode.py`` over all ranks (on one rank: its code without company).
Weights are random. Prints milliseconds of the slowest rank, ratios, and the error against a decode in float32;
``--json FILE`` writes all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from xditd.client.output_files import write_file

WAYS = ("diffusers", "channels_last", "bands")
CHANNELS = (128, 256, 512, 512)
SMALL_CHANNELS = (64, 64, 64, 64)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15, help="timed decodes; the median counts")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu with --small: a dry run")
    parser.add_argument("--small", action="store_true", help="a narrow VAE: a dry run")
    parser.add_argument("--json", type=Path)
    return parser


def run_rank(rank: int, ranks: int, given: argparse.Namespace, folder: str) -> None:
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.process import xfuser_start

    device = torch.device("cuda", rank) if given.device == "cuda" else torch.device("cpu")
    layout = xfuser_start.start(rank, ranks, f"{folder}/store", device)
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.skeletons import SkeletonCache

    channels = SMALL_CHANNELS if given.small else CHANNELS
    state = checkpoints.flux_vae_state_dict(0, channels=channels, encoder=False)
    cache = SkeletonCache(layout)

    def plugged(dtype: torch.dtype) -> Any:
        tensors = {name: tensor.bfloat16().to(device, dtype) for name, tensor in state.items()}
        plan = cache.plan({name: TensorInfo.of(tensor) for name, tensor in tensors.items()})
        plan.skeleton.plug(plan.bind(tensors))
        return plan.skeleton

    side = given.pixels // 8
    latents = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)

    def decode_by(skeleton: Any, latents: torch.Tensor, *, is_shared: bool = False) -> torch.Tensor:
        image: torch.Tensor = skeleton.operations.decode(skeleton, latents, is_shared=is_shared)
        return image

    exact = decode_by(plugged(torch.float32), latents.float())
    skeleton = plugged(torch.bfloat16)
    decodes: dict[str, Callable[[], torch.Tensor]] = {
        "diffusers": lambda: decode_by(skeleton, latents),
        "channels_last": lambda: decode_by(skeleton, latents.contiguous(memory_format=torch.channels_last)),
        "bands": lambda: decode_by(skeleton, latents, is_shared=True),
    }
    found = {}
    for way, decode in decodes.items():
        if given.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        image = decode()
        found[way] = {
            "ms": time_of(decode, given),
            "error": float((image.float() - exact).norm() / exact.norm()),
            "same_bits_again": torch.equal(decode(), image),
            "peak_bytes": torch.cuda.max_memory_allocated() if given.device == "cuda" else None,
        }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    xfuser_start.stop()


def time_of(decode: Callable[[], torch.Tensor], given: argparse.Namespace) -> list[float]:
    """Milliseconds of each decode, the image waited for, as a job does."""
    took = []
    for number in range(given.repeats + 2):
        started = time.perf_counter()
        decode()
        if given.device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            took.append((time.perf_counter() - started) * 1e3)
    return took


def main() -> None:
    given = build_parser().parse_args()
    if given.device == "cuda" and torch.cuda.device_count() < max(given.ranks):
        sys.exit(f"--ranks {max(given.ranks)}: there are {torch.cuda.device_count()} GPUs here, one for each rank")
    report: dict[str, Any] = {"machine": describe_machine(), "pixels": given.pixels, "groups": []}
    machine = report["machine"]
    print(f"{', '.join(machine['gpus']) or machine['cpu']}; torch {machine['versions']['torch']}")
    print(f"{given.pixels}x{given.pixels}, bfloat16")
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory(prefix="xditd-vae-") as folder:
            torch.multiprocessing.spawn(run_rank, (ranks, given, folder), nprocs=ranks)
            found = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]
        report["groups"].append({"ranks": ranks, "by_rank": found})
        print(f"\n{ranks} rank(s)")
        slowest = {way: max(statistics.median(each[way]["ms"]) for each in found) for way in WAYS}
        for way, ms in slowest.items():
            entry = found[0][way]
            peak = "" if entry["peak_bytes"] is None else f"  peak {entry['peak_bytes'] / 2**30:.2f} GiB"
            print(
                f"  {way:14s} {ms:8.1f} ms  {ms / slowest['diffusers']:.3f}x of diffusers  error {entry['error']:.1e}"
                f"  same bits again {all(each[way]['same_bits_again'] for each in found)}{peak}"
            )
    if given.json:
        write_file(given.json, json.dumps(report, indent=1).encode(), b"\n")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
