"""Time ``generate`` with fp8 matrix products, with a step cache, and with both, beside bf16.

    python benchmarks/run.py precision --workers 1 2
    python benchmarks/run.py precision --device cpu --small --steps 4 --pixels 128 --tokens 16

Whole ``generate`` jobs without a daemon, on random weights of full size. Prints seconds of the slowest rank, the ratio
to bf16, the number of skipped steps, and the relative error of the latents against bf16 on as many ranks.

Random weights show how much time a skipped step saves. They do not show which threshold keeps images good: their first
block changes from step to step in another way than a trained model's, and their error is not what one sees. CPUs have
no fused kernels, so a dry run has only the unmodified modules and the step cache.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import flux
import torch
from measuring import GIB, Report, add_device, add_ranks, need_gpus, print_table, run_on_ranks, synchronize

GUIDANCE = 3.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ranks(parser)
    add_device(parser)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.08, 0.6])


def run_rank(rank: int, ranks: int, store: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    from xditd.gpu_workers.process import xfuser_start

    is_cuda = given.device == "cuda"
    device = flux.device_of(given, rank)
    layout = xfuser_start.start(
        rank,
        ranks,
        store,
        device,
        kernels="fused" if is_cuda else "plain",
        precision="fp8" if is_cuda else "bf16",
    )
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache

    state = flux.state_dict(flux.scale_of(given).size, torch.bfloat16, device, 0)
    found: list[dict[str, Any]] = []
    expected: torch.Tensor | None = None
    for precision in dict.fromkeys(("bf16", layout.precision)):
        models = ModelCache(dataclasses.replace(layout, precision=precision))
        match = models.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        model = match.model
        reserved = model.reserve()
        started = time.perf_counter()
        model.plug(match.bind(state), "a", match.by_canonical_name(state))
        plug_ms = (time.perf_counter() - started) * 1e3
        generate(model, given, 2)  # fast path check and warm-up
        checks = model.take_checks()
        passed = [check.error for check in checks if check.is_used and check.error is not None]
        for threshold in (0.0, *given.thresholds):
            results, seconds = [], []
            for _ in range(2):
                synchronize(device)
                started = time.perf_counter()
                latents, reused = generate(model, given, given.steps, threshold)
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
        model.unplug()
    synchronize(device)
    xfuser_start.stop()
    return found


def generate(model: Any, given: argparse.Namespace, steps: int, threshold: float = 0.0) -> tuple[torch.Tensor, int]:
    """Run the workers' loop, as a job does; returns the latents and the number of steps that the cache skipped."""
    from xditd.gpu_workers.jobs.generate import Loop
    from xditd.gpu_workers.jobs.generation_inputs import seeded_noise
    from xditd.gpu_workers.models.operations import CallOptions, Wanted
    from xditd.gpu_workers.models.result_checks import FiniteCheck
    from xditd.gpu_workers.models.step_cache import StepCache

    generator = torch.Generator().manual_seed(0)
    conditioning = {
        "prompt_embeds": torch.randn(1, given.tokens, 4096, generator=generator).to(model.device),
        "pooled_prompt_embeds": torch.randn(1, 768, generator=generator).to(model.device),
    }
    noise = seeded_noise(0, (1, 16, given.pixels // 8, given.pixels // 8), model.dtype).to(model.device)
    wanted = Wanted(batch=1, height=given.pixels, width=given.pixels, steps=steps, guidance_scale=GUIDANCE)
    started = model.operations.recipe.start(model, wanted, conditioning, noise)
    options = CallOptions("class", started.foreseen, StepCache(threshold) if threshold else None)
    loop = Loop(model, model.operations, started, options, batch=1, steps=steps)
    latents = loop.run(FiniteCheck(), lambda *_: None, None)
    return latents, loop.reused_steps


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("precision", max(given.ranks), given.device)
    print(f"{given.pixels}x{given.pixels}, {given.tokens} text tokens, random weights in bfloat16:")
    print("this measures the time that a skipped step saves, not which threshold keeps images good")
    report.add(groups=[])
    for ranks in given.ranks:
        found = run_on_ranks(run_rank, ranks, given)
        report.add(groups=[*report.found["groups"], {"ranks": ranks, "found": found}])
        base = max(each[0]["seconds"] for each in found)
        rows = [("", "step cache", "time", "of bf16", "skipped", "error", "of a step, to plain", "same bits again")]
        for number, first in enumerate(found[0]):
            seconds = max(each[number]["seconds"] for each in found)
            assert {each[number]["reused"] for each in found} == {first["reused"]}, "ranks skipped different steps"
            step = first["error_of_a_step"]
            how = (first["precision"], f"{first['threshold']:g}" if first["threshold"] else "")
            times = (f"{seconds:.2f} s", f"{seconds / base:.3f}x", f"{first['reused']} of {given.steps}")
            checked = "REFUSED: these are plain" if first["refused"] else "" if step is None else f"{step:.1e}"
            same = all(each[number]["same_bits_again"] for each in found)
            rows.append((*how, *times, f"{first['error']:.1e}", checked, str(same)))
        print_table(f"{ranks} rank(s)", rows)
        last = found[0][-1]
        if last["own_bytes"]:
            size_gib = last["own_bytes"] / GIB
            print(f"  fp8 copy of the weights: {size_gib:.2f} GiB a rank, made in {last['plug_ms']:.1f} ms")
