"""A program, not a test: fused blocks of full width on one or more GPUs, beside plain modules and float32, as JSON.

python on_gpus.py OUT_FOLDER RANKS

Rank 0 writes ``facts.json``: for each case the errors of both ways against float32, and what the check saw.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from inputs import GUIDANCE, job, reference_latents

if TYPE_CHECKING:
    from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
    from xditd.gpu_workers.parallel.layouts import ParallelLayout

STEPS = 2
ALIKE = (1.0, 0.9999, 0.5)
"""Two steps that are alike, and one that is not."""
# text tokens, height, width, batch; the odd ones leave ranks unequal shares, and padding on the last one.
CASES = {
    "usual": (512, 1024, 1024, 1),
    "odd text, odd image": (301, 112, 112, 1),
    "odd total": (16, 112, 112, 1),
    "odd total, odd text": (15, 128, 128, 1),
    "two samples": (33, 64, 96, 2),
}


def run_rank(rank: int, ranks: int, folder: str) -> None:
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.process import xfuser_start

    gpu = torch.device("cuda", rank)
    started = xfuser_start.start(rank, ranks, f"{folder}/store", gpu, kernels="fused", precision="fp8")
    layout = dataclasses.replace(started, precision="bf16")
    from direct_jobs import generate

    state = {
        name: tensor.to(gpu)
        for name, tensor in checkpoints.flux1_state_dict(
            0, heads=24, double_blocks=2, single_blocks=2, dtype=torch.bfloat16
        ).items()
    }
    match = ModelCache(layout).match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    model = match.model
    exact = reference.transformer_from(state, dtype=torch.float32)
    facts: dict[str, Any] = {"attention": layout.fused_attention, "cases": {}}
    lossless: dict[str, torch.Tensor] = {}
    for case, given in ((case, job(*sizes)) for case, sizes in CASES.items()):
        model.plug(match.bind(state), "plain")
        plain = generate(model, **given, steps=STEPS, guidance_scale=GUIDANCE)
        model.plug(match.bind(state), "fused", match.by_canonical_name(state))
        fused = [generate(model, **given, steps=STEPS, guidance_scale=GUIDANCE) for _ in range(2)]
        expected = reference_latents(exact, given, STEPS)
        lossless[case] = fused[1]
        facts["cases"][case] = {
            "plain": distance(plain, expected),
            "fused": distance(fused[1], expected),
            "same bits twice": torch.equal(*fused),
        }
    check = model.module.fused.check
    facts["check"] = {"refused": check.is_refused, "passed": len(check._passed)}
    broken = state["single_blocks.1.linear2.weight"]
    kept = broken.clone()
    plugged = match.by_canonical_name(state)
    plugged["single_blocks.1.linear2.weight"] = torch.zeros_like(broken)
    model.plug(match.bind(state), "broken", plugged)
    given = job(17, 128, 128, 1)
    judged = generate(model, **given, steps=1, guidance_scale=GUIDANCE)
    model.plug(match.bind(state), "plain")
    facts["broken"] = {
        "refused": check.is_refused,
        "plain bits": torch.equal(judged, generate(model, **given, steps=1, guidance_scale=GUIDANCE)),
        "untouched": torch.equal(kept, broken),
    }
    facts["eight bits"] = eight_bits(started, state, lossless)
    facts["cached"] = cached(started, state)
    if rank == 0:
        Path(folder, "facts.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def eight_bits(
    layout: ParallelLayout, state: dict[str, torch.Tensor], lossless: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The same cases with products in eight bits, beside what they gave in sixteen, and what the copy of weights takes.

    Not beside float32: embedding a timestep that is rounded to bfloat16 costs more than all of the products.
    """
    from direct_jobs import generate

    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache

    cache = ModelCache(layout)
    match = cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    model = match.model
    before = torch.cuda.memory_allocated()
    model.plug(match.bind(state), "fp8", match.by_canonical_name(state))
    facts: dict[str, Any] = {
        "held": torch.cuda.memory_allocated() - before,
        "reserved": model.reserve(),
        "cases": {},
    }
    for case, given in ((case, job(*sizes)) for case, sizes in CASES.items()):
        results = [generate(model, **given, steps=STEPS, guidance_scale=GUIDANCE) for _ in range(2)]
        facts["cases"][case] = {
            "error": distance(results[0], lossless[case]),
            "same bits twice": torch.equal(*results),
        }
    check = cast(Any, model.module).fused.check
    errors = [each.error for each in check._passed.values()]
    facts["check"] = {"refused": check.is_refused, "passed": len(errors), "error": max(errors)}
    model.unplug()
    del results
    facts["left"] = torch.cuda.memory_allocated() - before
    return facts


def cached(layout: ParallelLayout, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Spare steps that are alike, in both precisions."""
    from direct_jobs import generate

    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.models.step_cache import StepCache

    facts: dict[str, Any] = {}
    for precision in ("bf16", "fp8"):
        match = ModelCache(dataclasses.replace(layout, precision=precision)).match(
            {name: TensorInfo.of(tensor) for name, tensor in state.items()}
        )
        match.model.plug(match.bind(state), precision, match.by_canonical_name(state))
        for case in ("odd total, odd text", "two samples"):
            given = job(*CASES[case])

            def run(
                threshold: float, given: dict[str, Any] = given, match: CheckpointMatch = match
            ) -> tuple[torch.Tensor, int]:
                cache = StepCache(threshold)
                latents = generate(
                    match.model, **given, steps=len(ALIKE), sigmas=ALIKE, guidance_scale=GUIDANCE, step_cache=cache
                )
                return latents, cache.reused

            (whole, none), (result, spared), (again, _) = run(1e-9), run(0.2), run(0.2)
            facts[f"{precision}, {case}"] = {
                "spared": [none, spared],
                "error": distance(result, whole),
                "same bits twice": torch.equal(result, again),
            }
        match.model.unplug()
    return facts


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


if __name__ == "__main__":
    count = int(sys.argv[2])
    torch.multiprocessing.spawn(run_rank, (count, sys.argv[1]), nprocs=count)
