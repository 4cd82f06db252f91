"""A program, not a test: fused blocks of full width on one or more GPUs, beside plain modules and float32, as JSON.

python on_gpus.py OUT_FOLDER RANKS

Rank 0 writes ``facts.json``: for each case the errors of both ways against float32, and what the canary saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from inputs import GUIDANCE, job, reference_latents

STEPS = 2
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
    from xditd.gpu_workers import reference, xfuser_start
    from xditd.gpu_workers.families.base import TensorInfo
    from xditd.gpu_workers.skeletons import SkeletonCache

    gpu = torch.device("cuda", rank)
    layout = xfuser_start.start(rank, ranks, f"{folder}/store", gpu, kernels="fused")
    from xditd.gpu_workers import pipelines

    state = {
        name: tensor.to(gpu)
        for name, tensor in checkpoints.flux1_state_dict(
            0, heads=24, double_blocks=2, single_blocks=2, dtype=torch.bfloat16
        ).items()
    }
    plan = SkeletonCache(layout).plan({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    skeleton = plan.skeleton
    exact = reference.transformer_from(state, dtype=torch.float32)
    facts: dict[str, Any] = {"attention": layout.fused_attention, "cases": {}}
    for case, given in ((case, job(*sizes)) for case, sizes in CASES.items()):
        skeleton.plug(plan.bind(state), "plain")
        plain = pipelines.generate(skeleton, **given, steps=STEPS, guidance_scale=GUIDANCE)
        skeleton.plug(plan.bind(state), "fused", plan.by_canonical_name(state))
        fused = [pipelines.generate(skeleton, **given, steps=STEPS, guidance_scale=GUIDANCE) for _ in range(2)]
        expected = reference_latents(exact, given, STEPS)
        facts["cases"][case] = {
            "plain": distance(plain, expected),
            "fused": distance(fused[1], expected),
            "same bits twice": torch.equal(*fused),
        }
    canary = skeleton.module._canary
    facts["canary"] = {"refused": canary.is_refused, "passed": len(canary._passed)}
    broken = state["single_blocks.1.linear2.weight"]
    kept = broken.clone()
    plugged = plan.by_canonical_name(state)
    plugged["single_blocks.1.linear2.weight"] = torch.zeros_like(broken)
    skeleton.plug(plan.bind(state), "broken", plugged)
    given = job(17, 128, 128, 1)
    judged = pipelines.generate(skeleton, **given, steps=1, guidance_scale=GUIDANCE)
    skeleton.plug(plan.bind(state), "plain")
    facts["broken"] = {
        "refused": canary.is_refused,
        "plain bits": torch.equal(judged, pipelines.generate(skeleton, **given, steps=1, guidance_scale=GUIDANCE)),
        "untouched": torch.equal(kept, broken),
    }
    if rank == 0:
        Path(folder, "facts.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


if __name__ == "__main__":
    count = int(sys.argv[2])
    torch.multiprocessing.spawn(run_rank, (count, sys.argv[1]), nprocs=count)
