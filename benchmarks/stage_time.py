"""FLUX.1 in stages (PipeFusion) at full size: a step's time and a job's error by warm-up steps and patches, in one run.

    python benchmarks/stage_time.py --ranks 2 --json stages.json
    python benchmarks/stage_time.py --ranks 2 --device cpu --small --pixels 128 --steps 6      # a dry run

Weights are random and the same on each GPU. The error is that of the latents against the same job with every step a
warm-up step, which is what one worker computes; that job's time is one worker's as well, but for what travels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import flux_weights
import torch
from machine import describe_machine

from xditd.client.output_files import write_file

SEED = 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--warm-up", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--patches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny transformer: a dry run")
    parser.add_argument("--json", type=Path)
    return parser


def run_rank(rank: int, given: argparse.Namespace, folder: str) -> None:
    from xditd.gpu_workers import xfuser_start
    from xditd.gpu_workers.layouts import Patching
    from xditd.ipc.degrees import Degrees

    device = torch.device("cuda", rank) if given.device == "cuda" else torch.device("cpu")
    layout = xfuser_start.start(rank, given.ranks, f"{folder}/store", device, Degrees(pipefusion=given.ranks))
    from xditd.gpu_workers import pipelines
    from xditd.gpu_workers.families.base import TensorInfo
    from xditd.gpu_workers.skeletons import SkeletonCache

    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    state = flux_weights.state_dict(flux_weights.SMALL if given.small else flux_weights.FULL, dtype, str(device), SEED)
    plan = SkeletonCache(layout).plan({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    plan.skeleton.plug(plan.bind(state))
    generator = torch.Generator().manual_seed(SEED)
    job = {
        "prompt_embeds": torch.randn(1, given.tokens, 4096, generator=generator),
        "pooled": torch.randn(1, 768, generator=generator),
        "noise": torch.randn(1, 16, given.pixels // 8, given.pixels // 8, generator=generator),
    }

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def run(patching: Patching, steps: int) -> tuple[torch.Tensor, float]:
        plan.skeleton.layout = replace(layout, patching=patching)
        wait()
        started = time.perf_counter()
        latents = pipelines.generate(plan.skeleton, **job, height=given.pixels, width=given.pixels, steps=steps)
        wait()
        return latents, time.perf_counter() - started

    run(Patching(warm_up_steps=1), 2)  # what a first job pays for kernels and workspaces
    exact, exact_s = run(Patching(warm_up_steps=given.steps), given.steps)
    found: list[dict[str, Any]] = []
    for patches in given.patches:
        for warm_up in given.warm_up:
            latents, took_s = run(Patching(patches, warm_up), given.steps)
            again, again_s = run(Patching(patches, warm_up), given.steps)
            found.append(
                {
                    "patches": patches,
                    "warm_up_steps": warm_up,
                    "jobs_s": [took_s, again_s],
                    "error": float((latents.float() - exact.float()).norm() / exact.float().norm()),
                    "same_bits_again": bool(torch.equal(latents, again)),
                }
            )
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    facts = {"attention": layout.attention_backend, "exact_s": exact_s, "max_memory_bytes": memory, "settings": found}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def main() -> None:
    given = build_parser().parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="xditd-stages-") as folder:
        torch.multiprocessing.spawn(run_rank, (given, folder), nprocs=given.ranks)
        ranks = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(given.ranks)]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{', '.join(machine['gpus']) or machine['cpu']}; {versions}")
    print(f"{given.pixels}x{given.pixels}, {given.tokens} text tokens, {given.steps} steps, {given.ranks} stages")
    exact_s = max(rank["exact_s"] for rank in ranks)
    print(f"every step a warm-up step: {exact_s:.3f} s, {exact_s / given.steps * 1e3:.1f} ms a step")
    for number, settings in enumerate(ranks[0]["settings"]):
        job_s = max(min(rank["settings"][number]["jobs_s"]) for rank in ranks)
        warm_up = settings["warm_up_steps"]
        patched_ms = (job_s - warm_up * exact_s / given.steps) / max(1, given.steps - warm_up) * 1e3
        print(
            f"  {settings['patches']} patches, {warm_up} warm-up steps: {job_s:.3f} s, {job_s / exact_s:.3f}x; "
            f"{patched_ms:.1f} ms a step in patches; error {settings['error']:.1e}; "
            f"same bits again {all(rank['settings'][number]['same_bits_again'] for rank in ranks)}"
        )
    if given.json:
        write_file(
            given.json, json.dumps({"machine": machine, "arguments": _plain(given), "ranks": ranks}, indent=1).encode()
        )


def _plain(given: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}


if __name__ == "__main__":
    main()
