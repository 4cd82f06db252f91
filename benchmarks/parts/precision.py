"""What trading precision gives, and what it costs: fp8 products, a step cache, and both, beside bf16 in one run.

    python benchmarks/precision.py --ranks 1 2
    python benchmarks/precision.py --device cpu --small --steps 4 --pixels 128 --tokens 16

Whole ``generate`` jobs without a daemon, on random weights of full size. Prints seconds of the slowest rank, the ratio
to bf16, how many steps were spared, and the relative error of the latents against bf16 on as many ranks.

Random weights say what a spared step saves. They say nothing about which threshold an image can bear: their first block
does not change from step to step as that of a trained model does, and neither does their error mean what one sees.
CPUs have no fused kernels, so plain modules and the step cache alone run there: a dry run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import flux_weights
import torch
from machine import describe_machine

from xditd.client.output_files import write_file

GUIDANCE = 3.5


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.08, 0.6])
    parser.add_argument("--small", action="store_true", help="a tiny transformer: a dry run")
    parser.add_argument("--json", type=Path)
    return parser


def run_rank(rank: int, ranks: int, given: argparse.Namespace, folder: str) -> None:
    from xditd.gpu_workers.process import xfuser_start

    is_cuda = given.device == "cuda"
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    layout = xfuser_start.start(
        rank,
        ranks,
        f"{folder}/store",
        device,
        kernels="fused" if is_cuda else "plain",
        precision="fp8" if is_cuda else "bf16",
    )
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.skeletons import SkeletonCache

    size = flux_weights.SMALL if given.small else flux_weights.FULL
    state = flux_weights.state_dict(size, torch.bfloat16, str(device), 0)
    found: list[dict[str, Any]] = []
    expected: torch.Tensor | None = None
    for precision in dict.fromkeys(("bf16", layout.precision)):
        skeletons = SkeletonCache(dataclasses.replace(layout, precision=precision))
        plan = skeletons.plan({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        skeleton = plan.skeleton
        reserved = skeleton.reserve()
        started = time.perf_counter()
        skeleton.plug(plan.bind(state), "a", plan.by_canonical_name(state))
        plug_ms = (time.perf_counter() - started) * 1e3
        generate(skeleton, given, 2)  # compared with plain modules, and warm
        checks = skeleton.take_checks()
        passed = [check.error for check in checks if check.is_used and check.error is not None]
        for threshold in (0.0, *given.thresholds):
            results, seconds = [], []
            for _ in range(2):
                synchronize(device)
                started = time.perf_counter()
                latents, reused = generate(skeleton, given, given.steps, threshold)
                results.append(latents.float())
                synchronize(device)
                seconds.append(time.perf_counter() - started)
            expected = results[0] if expected is None else expected
            found.append(
                {
                    "precision": precision,
                    "threshold": threshold,
                    "seconds": min(seconds),
                    "reused": reused,
                    "error": float((results[0] - expected).norm() / expected.norm()),
                    "same_bits_again": bool(torch.equal(*results)),
                    "error_of_a_step": max(passed, default=None),
                    "refused": any(not check.is_used for check in checks),
                    "own_bytes": reserved,
                    "plug_ms": plug_ms,
                }
            )
        skeleton.unplug()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    synchronize(device)
    xfuser_start.stop()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generate(skeleton: Any, given: argparse.Namespace, steps: int, threshold: float = 0.0) -> tuple[torch.Tensor, int]:
    """Run the workers' loop, as a job does; returns the latents and how many steps the cache spared."""
    from xditd.gpu_workers.jobs.generate import Loop, seeded_noise
    from xditd.gpu_workers.models.operations import CallOptions, Wanted
    from xditd.gpu_workers.models.result_checks import FiniteCheck
    from xditd.gpu_workers.models.step_cache import StepCache

    generator = torch.Generator().manual_seed(0)
    conditioning = {
        "prompt_embeds": torch.randn(1, given.tokens, 4096, generator=generator).to(skeleton.device),
        "pooled_prompt_embeds": torch.randn(1, 768, generator=generator).to(skeleton.device),
    }
    noise = seeded_noise(0, (1, 16, given.pixels // 8, given.pixels // 8), skeleton.dtype).to(skeleton.device)
    wanted = Wanted(batch=1, height=given.pixels, width=given.pixels, steps=steps, guidance_scale=GUIDANCE)
    started = skeleton.operations.recipe.start(skeleton, wanted, conditioning, noise)
    options = CallOptions("class", started.foreseen, StepCache(threshold) if threshold else None)
    loop = Loop(skeleton, skeleton.operations, started, options, batch=1, steps=steps)
    latents = loop.run(FiniteCheck(), lambda *_: None, None)
    return latents, loop.reused_steps


def main() -> None:
    given = build_parser().parse_args()
    if given.device == "cuda" and torch.cuda.device_count() < max(given.ranks):
        sys.exit(f"--ranks {max(given.ranks)}: there are {torch.cuda.device_count()} GPUs here; each rank needs one")
    machine = describe_machine()
    report: dict[str, Any] = {"machine": machine, "groups": []}
    print(f"{', '.join(machine['gpus'])}; {', '.join(f'{k} {v}' for k, v in machine['versions'].items())}")
    print(
        f"{given.pixels}x{given.pixels}, {given.tokens} text tokens, {given.steps} steps, random weights in bfloat16:"
    )
    print("what a spared step saves is measured here; which threshold an image can bear is not")
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory(prefix="xditd-precision-") as folder:
            torch.multiprocessing.spawn(run_rank, (ranks, given, folder), nprocs=ranks)
            found = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]
        report["groups"].append({"ranks": ranks, "found": found})
        print(f"\n{ranks} rank(s)")
        base = max(each[0]["seconds"] for each in found)
        for number, first in enumerate(found[0]):
            seconds = max(each[number]["seconds"] for each in found)
            assert {each[number]["reused"] for each in found} == {first["reused"]}, "ranks spared other steps"
            cache = f"step cache {first['threshold']:g}" if first["threshold"] else ""
            step = (
                ""
                if first["error_of_a_step"] is None
                else f"  (of a step, against plain {first['error_of_a_step']:.1e})"
            )
            print(
                f"  {first['precision']:5s} {cache:16s} {seconds:7.2f} s  {seconds / base:.3f}x  "
                f"{first['reused']:3d} of {given.steps} steps spared  error {first['error']:.1e}{step}  "
                f"same bits again {all(each[number]['same_bits_again'] for each in found)}"
                f"{'  REFUSED: these are plain' if first['refused'] else ''}"
            )
        last = found[0][-1]
        if last["own_bytes"]:
            size = last["own_bytes"] / 2**30
            print(f"  fp8 copy of the weights: {size:.2f} GiB a rank, made in {last['plug_ms']:.1f} ms")
    if given.json:
        write_file(given.json, json.dumps(report, indent=1).encode(), b"\n")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
