"""A program, not a test: run jobs on stages, one for each device, and the same ones in plain diffusers.

    python on_stages.py OUT_FOLDER DTYPE DEVICE DEVICE ...

Writes ``rank<N>.safetensors`` with ``<case>/<round>``, ``rank<N>.json`` with what else happened, and
``reference.safetensors``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

SEED = 0
GUIDANCE = 3.5
ROUNDS = 2
SIGMAS = (1.0, 0.8, 0.55, 0.3, 0.1)


@dataclass(frozen=True)
class Case:
    """One job, on workers with this many patches and warm-up steps. Blocks are double and single ones."""

    tokens: int = 16
    height: int = 128
    width: int = 128
    batch: int = 1
    steps: int = 5
    patches: int = 2
    warm_up: int = 1
    blocks: tuple[int, int] = (2, 2)
    is_dev: bool = True
    sigmas: tuple[float, ...] | None = None

    @property
    def is_exact(self) -> bool:
        return self.patches == 1 or self.warm_up >= self.steps


CASES = {
    "every step warms up": Case(warm_up=5),
    "every step warms up, odd tokens, two images": Case(tokens=15, height=112, width=112, batch=2, warm_up=9),
    "every step warms up, schnell": Case(warm_up=5, is_dev=False),
    "every step warms up, blocks do not divide": Case(warm_up=5, blocks=(1, 4)),
    "every step warms up, given sigmas": Case(warm_up=5, sigmas=SIGMAS),
    "one step": Case(steps=1),
    "one patch": Case(patches=1),
    "patches": Case(),
    "patches that do not divide, odd text, two images": Case(tokens=15, height=112, width=112, batch=2, patches=3),
    "patches, longer warm-up": Case(warm_up=3),
    "patches, blocks do not divide": Case(blocks=(3, 2), patches=4),
    "patches, given sigmas": Case(sigmas=SIGMAS),
}
CANCELLED = CASES["patches that do not divide, odd text, two images"]


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """The conditioning and noise of a case, the same in every process."""
    generator = torch.Generator().manual_seed(case.tokens * 10_000 + case.height + case.width)
    return {
        "prompt_embeds": torch.randn(case.batch, case.tokens, 4096, generator=generator),
        "pooled": torch.randn(case.batch, 768, generator=generator),
        "noise": torch.randn(case.batch, 16, case.height // 8, case.width // 8, generator=generator),
    }


@lru_cache
def checkpoint(blocks: tuple[int, int], is_dev: bool, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from xditd.client.demo import checkpoints

    double, single = blocks
    made = checkpoints.flux1_state_dict(SEED, double_blocks=double, single_blocks=single, guidance=is_dev, dtype=dtype)
    return {name: tensor.to(device) for name, tensor in made.items()}


def run_rank(rank: int, devices: list[str], dtype: torch.dtype, folder: str) -> None:
    from safetensors.torch import save_file

    from xditd.gpu_workers import xfuser_start
    from xditd.gpu_workers.layouts import Patching
    from xditd.ipc.degrees import Degrees

    torch.set_num_threads(1)
    layout = xfuser_start.start(
        rank, len(devices), f"{folder}/store", torch.device(devices[rank]), Degrees(pipefusion=len(devices))
    )
    from xditd.gpu_workers import pipelines
    from xditd.gpu_workers.families.base import TensorInfo
    from xditd.gpu_workers.skeletons import Skeleton, SkeletonCache
    from xditd.ipc.errors import Unsupported

    def skeleton_for(case: Case) -> Skeleton:
        state = checkpoint(case.blocks, case.is_dev, devices[rank], dtype)
        laid_out = replace(layout, patching=Patching(case.patches, case.warm_up))
        plan = SkeletonCache(laid_out).plan({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        plan.skeleton.plug(plan.bind(state))
        return plan.skeleton

    def generate(case: Case, skeleton: Skeleton, **more: Any) -> torch.Tensor:
        return pipelines.generate(
            skeleton,
            **inputs(case),
            height=case.height,
            width=case.width,
            steps=case.steps,
            sigmas=case.sigmas,
            guidance_scale=GUIDANCE,
            **more,
        )

    results: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    for name, case in CASES.items():
        skeleton = skeleton_for(case)
        for attempt in range(1 if case.is_exact else ROUNDS):
            results[f"{name}/{attempt}"] = generate(case, skeleton)

    for name in ("every step warms up", "patches", "one step"):
        case, seen, steps = CASES[name], [], []
        skeleton = skeleton_for(case)
        results[f"watched/{name}"] = generate(
            case,
            skeleton,
            on_step=lambda done, total, steps=steps, seen=seen: steps.append((done, total, len(seen))),
            on_denoised=lambda denoised, seen=seen: seen.append(denoised.clone()),
        )
        facts[f"steps/{name}"] = steps
        for number, denoised in enumerate(seen):
            results[f"denoised/{name}/{number}"] = denoised

    facts["cancelled"] = [cancel(rank, layout.device, generate, CANCELLED, skeleton_for, after) for after in (1, 2, 5)]
    results["after cancelling"] = generate(CANCELLED, skeleton_for(CANCELLED))

    skeleton = skeleton_for(CASES["patches"])
    given = inputs(CASES["patches"])
    try:
        pipelines.denoise(
            skeleton,
            latents=given["noise"],
            timestep=torch.full((1,), 0.7),
            conditioning=pipelines.condition(skeleton, prompt_embeds=given["prompt_embeds"], pooled=given["pooled"]),
            guidance=torch.full((1,), GUIDANCE),
        )
    except Unsupported as error:
        facts["denoise"] = error.detail
    small = Case(height=16, width=16, patches=2)
    try:
        generate(small, skeleton_for(small))
    except Unsupported as error:
        facts["one image token"] = error.detail
    try:
        SkeletonCache(replace(layout, degrees=Degrees(pipefusion=3))).plan(
            {name: TensorInfo.of(tensor) for name, tensor in checkpoint((1, 1), True, "cpu", dtype).items()}
        )
    except Unsupported as error:
        facts["two blocks"] = error.detail
    save_file({name: tensor.cpu().contiguous() for name, tensor in results.items()}, f"{folder}/rank{rank}.safetensors")
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def cancel(rank: int, device: torch.device, generate: Any, case: Case, skeleton_for: Any, after: int) -> str:
    """Cancel a job on rank 0 once some steps are done, as the daemon does; return what this rank raised."""
    from xditd.gpu_workers.pipefusion.stop_relay import StopRelay
    from xditd.gpu_workers.progress import Progress
    from xditd.ipc.errors import Cancelled

    told: list[int] = []
    progress = Progress(rank == 0, device, lambda: len(told) >= after, lambda done, *_: told.append(done), StopRelay())
    try:
        generate(case, skeleton_for(case), on_step=progress.step)
    except Cancelled as error:
        return error.detail
    return "not cancelled"


def reference(dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """The same jobs in plain diffusers, in this process."""
    from xditd.gpu_workers import reference as plain

    found = {}
    for name, case in CASES.items():
        given = inputs(case)
        found[name] = plain.reference_latents(
            plain.transformer_from(checkpoint(case.blocks, case.is_dev, device, dtype)),
            prompt_embeds=given["prompt_embeds"],
            pooled_prompt_embeds=given["pooled"],
            noise=given["noise"],
            height=case.height,
            width=case.width,
            steps=case.steps,
            sigmas=None if case.sigmas is None else list(case.sigmas),
            guidance_scale=GUIDANCE,
        )
    return found


def main(folder: str, dtype_name: str, devices: list[str]) -> None:
    from safetensors.torch import save_file

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype_name]
    torch.multiprocessing.spawn(run_rank, (devices, dtype, folder), nprocs=len(devices))
    expected = reference(dtype, devices[0])
    save_file({name: tensor.cpu().contiguous() for name, tensor in expected.items()}, f"{folder}/reference.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
