"""A program, not a test: run jobs on stages, one for each device, and the same ones in plain diffusers.

    python on_stages.py OUT_FOLDER DTYPE CASES DEVICE DEVICE ...

``CASES`` are names joined by ``;``, or ``all``, which also watches, cancels and refuses jobs. Writes
``rank<N>.safetensors`` with ``<case>/<round>``, ``rank<N>.json`` with what else was seen, ``reference.safetensors``.
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
ALL = "all"
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


def chosen(cases: str) -> dict[str, Case]:
    return CASES if cases == ALL else {name: CASES[name] for name in cases.split(";")}


def run_rank(rank: int, devices: list[str], dtype: torch.dtype, cases: str, folder: str) -> None:
    from safetensors.torch import save_file

    from xditd.gpu_workers import xfuser_start
    from xditd.ipc.degrees import Degrees

    torch.set_num_threads(1)
    layout = xfuser_start.start(
        rank, len(devices), f"{folder}/store", torch.device(devices[rank]), Degrees(pipefusion=len(devices))
    )
    jobs = Jobs(layout, dtype)
    for name, case in chosen(cases).items():
        for attempt in range(1 if case.is_exact else ROUNDS):
            jobs.results[f"{name}/{attempt}"] = jobs.generate(case)
    if cases == ALL:
        jobs.watch()
        jobs.cancel_and_go_on()
        jobs.round_as_comfyui()
        jobs.break_weights()
        jobs.ask_for_what_is_refused()
    results = {name: tensor.cpu().contiguous() for name, tensor in jobs.results.items()}
    save_file(results, f"{folder}/rank{rank}.safetensors")
    Path(folder, f"rank{rank}.json").write_text(json.dumps(jobs.facts))
    xfuser_start.stop()


class Jobs:
    """Jobs of one rank, what they gave, and what else was seen."""

    def __init__(self, layout: Any, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        self.results: dict[str, torch.Tensor] = {}
        self.facts: dict[str, Any] = {}

    def generate(self, case: Case, **more: Any) -> torch.Tensor:
        from xditd.gpu_workers import pipelines

        return pipelines.generate(
            self.skeleton_for(case),
            **inputs(case),
            height=case.height,
            width=case.width,
            steps=case.steps,
            sigmas=case.sigmas,
            guidance_scale=GUIDANCE,
            **more,
        )

    def skeleton_for(self, case: Case) -> Any:
        from xditd.gpu_workers.layouts import Patching

        state = checkpoint(case.blocks, case.is_dev, str(self.layout.device), self.dtype)
        plan = self.plan(state, patching=Patching(case.patches, case.warm_up))
        plan.skeleton.plug(plan.bind(state))
        return plan.skeleton

    def plan(self, state: dict[str, torch.Tensor], **changes: Any) -> Any:
        from xditd.gpu_workers.families.base import TensorInfo
        from xditd.gpu_workers.skeletons import SkeletonCache

        described = {name: TensorInfo.of(tensor) for name, tensor in state.items()}
        return SkeletonCache(replace(self.layout, **changes)).plan(described)

    def watch(self) -> None:
        for name in ("every step warms up", "patches", "one step"):
            seen: list[torch.Tensor] = []
            steps: list[tuple[int, int, int]] = []
            self.results[f"watched/{name}"] = self.generate(
                CASES[name],
                on_step=lambda done, total, steps=steps, seen=seen: steps.append((done, total, len(seen))),
                on_denoised=lambda denoised, seen=seen: seen.append(denoised.clone()),
            )
            self.facts[f"steps/{name}"] = steps
            for number, denoised in enumerate(seen):
                self.results[f"denoised/{name}/{number}"] = denoised

    def cancel_and_go_on(self) -> None:
        """Cancel a job on rank 0 after some steps, as the daemon does."""
        from xditd.gpu_workers.pipefusion.stop_relay import StopRelay
        from xditd.gpu_workers.progress import Progress
        from xditd.ipc.errors import Cancelled

        self.facts["cancelled"] = []
        for after in (1, 2, 5):
            told: list[int] = []
            progress = Progress(
                self.layout.rank == 0,
                self.layout.device,
                lambda told=told, after=after: len(told) >= after,
                lambda done, *_, told=told: told.append(done),
                StopRelay(),
            )
            try:
                self.generate(CANCELLED, on_step=progress.step)
            except Cancelled as error:
                self.facts["cancelled"].append(error.detail)
        self.results["after cancelling"] = self.generate(CANCELLED)

    def round_as_comfyui(self) -> None:
        """Generate with timesteps and latents in float32, which in float32 changes no bit."""
        for name in ("every step warms up, given sigmas", "patches, given sigmas"):
            self.results[f"comfyui/{name}"] = self.generate(CASES[name], variant="float32_time")

    def break_weights(self) -> None:
        """Put a NaN into the weights of the last stage between two steps, and take it out again."""
        from types import SimpleNamespace

        from xditd.gpu_workers.result_checks import FiniteCheck
        from xditd.ipc.tensors import ComponentKind

        component: Any = SimpleNamespace(
            component_id="c1",
            manifest=SimpleNamespace(kind=ComponentKind.TRANSFORMER, label="some"),
            plan=SimpleNamespace(dtype=self.dtype),
        )
        case = CASES["patches"]
        bias = checkpoint(case.blocks, case.is_dev, str(self.layout.device), self.dtype)["final_layer.linear.bias"]
        kept = bias.clone()

        def spoil(done: int, _: int) -> None:
            if done == 3:
                bias[2] = torch.nan

        finite = FiniteCheck()
        self.generate(case, on_step=spoil, finite=finite)
        bias.copy_(kept)
        fault = finite.fault(component)
        self.facts["not finite"] = "" if fault is None else fault.detail

    def ask_for_what_is_refused(self) -> None:
        from xditd.gpu_workers import pipelines
        from xditd.gpu_workers.step_cache import StepCache
        from xditd.ipc.degrees import Degrees
        from xditd.ipc.errors import Unsupported

        def denoise() -> None:
            skeleton, given = self.skeleton_for(CASES["patches"]), inputs(CASES["patches"])
            known = pipelines.condition(skeleton, prompt_embeds=given["prompt_embeds"], pooled=given["pooled"])
            guidance = torch.full((1,), GUIDANCE)
            timestep = torch.full((1,), 0.7)
            pipelines.denoise(
                skeleton, latents=given["noise"], timestep=timestep, conditioning=known, guidance=guidance
            )

        for what, ask in {
            "denoise": denoise,
            "step cache": lambda: self.generate(CASES["patches"], step_cache=StepCache(0.1)),
            "one image token": lambda: self.generate(Case(height=16, width=16, patches=2)),
            "two blocks": lambda: self.plan(checkpoint((1, 1), True, "cpu", self.dtype), degrees=Degrees(pipefusion=3)),
        }.items():
            try:
                ask()
            except Unsupported as error:
                self.facts[what] = error.detail


def reference(dtype: torch.dtype, cases: str, device: str) -> dict[str, torch.Tensor]:
    """The same jobs in plain diffusers, in this process."""
    from xditd.gpu_workers import reference as plain

    model = lru_cache(lambda *which: plain.transformer_from(checkpoint(*which, device, dtype)))
    found = {}
    for name, case in chosen(cases).items():
        given = inputs(case)
        found[name] = plain.reference_latents(
            model(case.blocks, case.is_dev),
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


def main(folder: str, dtype_name: str, cases: str, devices: list[str]) -> None:
    from safetensors.torch import save_file

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype_name]
    torch.multiprocessing.spawn(run_rank, (devices, dtype, cases, folder), nprocs=len(devices))
    expected = reference(dtype, cases, devices[0])
    save_file({name: tensor.cpu().contiguous() for name, tensor in expected.items()}, f"{folder}/reference.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
