"""Time whole generations with decode by family through a daemon, beside diffusers' own pipelines.

    python benchmarks/run.py generate_families --workers 1
    python benchmarks/run.py generate_families --models qwen_image flux2 --workers 2 --json FILE
    python benchmarks/run.py generate_families --models wan --steps 2 --repeats 2 --rivals eager
    python benchmarks/run.py generate_families --device cpu --small --workers 1

Wan 2.1 14B makes 81 frames of 832x480, Qwen-Image and FLUX.2-dev 1024x1024; Wan and Qwen-Image with guidance, which is
two forwards a step. Weights are random bfloat16 of full size, made on the first GPU and lent from there; diffusers'
pipeline in this process runs on the same tensors, in turns with the daemon, then with ``compile_repeated_blocks``. On
several GPUs, diffusers' ``enable_parallelism`` runs last, in processes of its own, after the daemon has ended; every
rank decodes there. Prints medians: a step, the decode and the whole in ms, ratios to the pipeline in this process, the
relative error of latents and images against it, and for the daemon what it was lent and copied, the memory that the
busiest worker took for lends and jobs (``lend_gib``, ``jobs_gib``; without what it maps), how long it took to choose
how the model runs (``ready_s``; for diffusers' it is the first compiled generation), and the choice.

Needs: one GPU for each worker (78 GiB for flux2); --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from family_pipelines import FAMILIES, Generation, Ran, make, run_pipeline
from machine import gpu_memory_by_process
from measuring import GIB, Report, add_device, add_ranks, need_gpus, print_table, run_on_ranks, say
from parts.modules import path_of

from xditd.client import Client, Loan
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.tensors import Acceleration

RIVALS = ("eager", "compiled", "parallel")
STEPS = {"wan": 2, "qwen_image": 8, "flux2": 8}
REPEATS = {"wan": 2, "qwen_image": 3, "flux2": 3}
SETTLING_STEPS = {"wan": 1, "qwen_image": 2, "flux2": 1}
"""Steps of the generations before the timed ones. Qwen-Image's schedule has two at least."""
SETTLES_WITHIN_S = 240.0
SETTLES_EVERY_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, help="of a generation; by default 2 of wan, 8 of the others")
    parser.add_argument("--repeats", type=int, help="timed generations of each; by default 2 of wan, 3 of the others")
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS, help="diffusers' pipelines")
    parser.add_argument("--acceleration", default="auto", choices=get_args(Acceleration), help="of the workers")
    parser.add_argument("--flags", action="append", default=[], help="a flag of the daemon, --flags=--name=value")
    add_ranks(parser)
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("generate_families", max(given.ranks), given.device)
    for ranks in given.ranks:
        for name in given.models:
            title = f"{name}, {ranks} workers"
            found: dict[str, dict[str, Any]] = {}
            about = measure(name, ranks, given, found, lambda now, title=title: report.add(**{title: now}))
            if ranks > 1 and "parallel" in given.rivals:
                say(f"{title}: diffusers' enable_parallelism")
                for way, each in run_on_ranks(time_parallel, ranks, name, given)[0].items():
                    found[way] = each | ratios(each, found.get("eager here"))
                report.add(**{title: found})
            columns = list(dict.fromkeys(column for each in found.values() for column in each if column != "paths"))
            rows = [(way, *(str(each.get(column, "")) for column in columns)) for way, each in found.items()]
            print_table(f"{title}: {about}", [("", *columns), *rows])
            print(*(f"  the daemon's forwards: {path}" for path in found["daemon"]["paths"]), sep="\n", flush=True)


def steps_of(name: str, given: argparse.Namespace) -> tuple[int, int]:
    """Return steps and repeats of the timed generations."""
    return given.steps or STEPS[name], given.repeats or REPEATS[name]


def device_and_dtype(given: argparse.Namespace, rank: int = 0) -> tuple[torch.device, torch.dtype]:
    is_cuda = given.device == "cuda"
    return (torch.device("cuda", rank), torch.bfloat16) if is_cuda else (torch.device("cpu"), torch.float32)


def measure(
    name: str,
    ranks: int,
    given: argparse.Namespace,
    found: dict[str, dict[str, Any]],
    on_found: Callable[[dict[str, dict[str, Any]]], None],
) -> str:
    """Time the daemon and the pipelines of this process into ``found``; return what they generated."""
    generation = make(name, *device_and_dtype(given), small=given.small)
    steps, repeats = steps_of(name, given)
    gib = {part: size / GIB for part, size in generation.bytes_by_part().items()}
    weights = ", ".join(f"{part} {size:.1f} GiB" for part, size in gib.items())
    sides = "x".join(str(each) for each in generation.sides.values())
    about = f"height x width (x frames) {sides}, {steps} steps, guidance {generation.guidance:g}; {weights}"
    with tempfile.TemporaryDirectory(prefix="xditd-generate-") as folder:
        flags = ["--acceleration", given.acceleration, *given.flags]
        daemon = DaemonProcess(Path(folder, "daemon.log"), ranks, given.device, flags)
        client = None
        try:
            client = daemon.connect()
            client.wait_ready(300.0)
            say(f"{name}, {ranks} workers: lend and settle")
            served = Served(client, generation, name, given.acceleration)
            served.settle()
            here: list[Ran] = []
            there: list[Ran] = []
            if "eager" in given.rivals:
                run_pipeline(generation, SETTLING_STEPS[name])
            say(f"{name}, {ranks} workers: timed, in turns")
            for _ in range(repeats):
                if "eager" in given.rivals:
                    here.append(run_pipeline(generation, steps))
                there.append(served.generate(steps))
            if here:
                found["eager here"] = times(here)
            found["daemon"] = times(there) | served.facts()
            if here:
                found["daemon"] |= ratios(found["daemon"], found["eager here"]) | errors(there[-1], here[-1])
            on_found(found)
        finally:
            daemon.stop(client)
    if "compiled" in given.rivals:
        say(f"{name}, {ranks} workers: compile_repeated_blocks")
        found["compiled here"] = time_compiled(generation, name, steps, repeats)
        found["compiled here"] |= ratios(found["compiled here"], found.get("eager here"))
        if "whole_ms" in found["compiled here"]:
            found["daemon"]["of_compiled"] = ratios(found["daemon"], found["compiled here"])["whole_ratio"]
        on_found(found)
    generation.pipeline.transformer = None
    del generation
    free(given.device)
    return about


class Served:
    """A generation whose transformer and VAE are lent to a daemon."""

    def __init__(self, client: Client, generation: Generation, name: str, acceleration: Acceleration) -> None:
        self._client, self._generation, self._name, self._acceleration = client, generation, name, acceleration
        self._workers = {worker.pid for worker in client.status().workers}
        self._before = self._memory_bytes()
        self._lend_ms: dict[str, float] = {}
        self.transformer = self._lend("transformer")
        self.vae = self._lend("vae")
        self._after_lend = self._memory_bytes()
        self._ready_s = 0.0

    def _lend(self, part: str) -> Loan:
        began = time.perf_counter()
        state = getattr(self._generation.pipeline, part).state_dict()
        loan = self._client.lend(state, kind=part, label=f"{self._name} {part}")
        self._lend_ms[part] = round((time.perf_counter() - began) * 1e3, 1)
        return loan

    def _memory_bytes(self) -> int:
        """Return the GPU memory of the busiest worker, without what it maps of this process."""
        return max((size for pid, size in gpu_memory_by_process().items() if pid in self._workers), default=0)

    def generate(self, steps: int) -> Ran:
        asked = self._generation
        began = time.perf_counter()
        result = self._client.generate(
            self.transformer,
            asked.conditioning,
            vae=self.vae,
            steps=steps,
            noise=asked.noise,
            guidance_scale=asked.guidance,
            **asked.sides,
        ).result()
        whole_ms = (time.perf_counter() - began) * 1e3
        assert result.image is not None
        images = result.image.movedim(2, 1) if result.image.ndim == 5 else result.image  # frames first, as diffusers
        timings = result.timings_ms
        return Ran(result.latents, images / 2 + 0.5, timings["steps"] / steps, timings["decode"], whole_ms)

    def settle(self) -> None:
        """Generate until the workers have chosen how the transformer runs, and once with all steps."""
        class_name = type(self._generation.pipeline.transformer).__name__
        began = time.perf_counter()
        is_settled = False
        while not is_settled and time.perf_counter() - began < SETTLES_WITHIN_S:
            self.generate(SETTLING_STEPS[self._name])
            is_settled = self._is_settled(class_name)
            if not is_settled:
                time.sleep(SETTLES_EVERY_S)  # blocks are compiled in the background; a generation would slow that
        self._ready_s = time.perf_counter() - began
        self.generate(SETTLING_STEPS[self._name])

    def _is_settled(self, class_name: str) -> bool:
        if self._generation.noise.device.type == "cpu":
            return True  # forwards on the CPU are eager
        found = [each for each in self._client.status().forward_paths if each.class_name == class_name]
        if self._acceleration == "eager" or not found:
            return self._acceleration == "eager"
        return bool(found[-1].detail) or self._acceleration == "captured" or "compiled" in found[-1].path

    def facts(self) -> dict[str, Any]:
        """Return what the loans took, and how forwards run, the newest choices.

        Of the busiest worker's memory, without what it maps of this process: ``lend_gib`` came with the loans,
        ``jobs_gib`` with the generations since.
        """
        loans = (self.transformer, self.vae)
        paths = self._client.status().forward_paths[-2:]
        return {
            "lend_ms": round(sum(self._lend_ms.values()), 1),
            "lent_gib": round(sum(each.lent_bytes for each in loans) / GIB, 2),
            "copied_gib": round(sum(each.copied.total for each in loans) / GIB, 2),
            "lend_gib": round((self._after_lend - self._before) / GIB, 2),
            "jobs_gib": round((self._memory_bytes() - self._after_lend) / GIB, 2),
            "ready_s": round(self._ready_s, 1),
            "paths": [f"{each.shapes}: {path_of(each)}" for each in paths] or ["eager"],
        }


def times(runs: list[Ran]) -> dict[str, Any]:
    """Return the medians in ms, and the longest whole by the shortest."""
    wholes = [each.whole_ms for each in runs]
    return {
        "step_ms": round(statistics.median(each.step_ms for each in runs), 1),
        "decode_ms": round(statistics.median(each.decode_ms for each in runs), 1),
        "whole_ms": round(statistics.median(wholes), 1),
        "spread": round(max(wholes) / min(wholes), 3),
    }


def ratios(found: dict[str, Any], base: dict[str, Any] | None) -> dict[str, float]:
    """Return the times by those of another way, where both have any."""
    if base is None or "step_ms" not in found or "step_ms" not in base:
        return {}
    return {f"{each}_ratio": round(found[f"{each}_ms"] / base[f"{each}_ms"], 3) for each in ("step", "decode", "whole")}


def errors(ours: Ran, right: Ran) -> dict[str, float]:
    """Return the relative errors of latents and images."""
    pairs = {"error": (ours.latents, right.latents), "image_error": (ours.images, right.images)}
    found = {}
    for name, (mine, theirs) in pairs.items():
        theirs = theirs.double().cpu()
        found[name] = float(f"{float((mine.double().cpu() - theirs).norm() / theirs.norm()):.1e}")
    return found


def time_compiled(generation: Generation, name: str, steps: int, repeats: int) -> dict[str, Any]:
    """Time the pipeline after ``compile_repeated_blocks``, or return the first line of the error."""
    try:
        torch.compiler.reset()
        began = time.perf_counter()
        generation.pipeline.transformer.compile_repeated_blocks(fullgraph=False)
        run_pipeline(generation, SETTLING_STEPS[name])
        made_s = time.perf_counter() - began
        run_pipeline(generation, SETTLING_STEPS[name])
        return times([run_pipeline(generation, steps) for _ in range(repeats)]) | {"ready_s": round(made_s, 1)}
    # Anything: compilers lack what a class does, or there is none.
    except Exception as error:  # noqa: BLE001
        traceback.clear_frames(error.__traceback__)  # they hold the model
        return {"fault": first_line(error)}


def time_parallel(rank: int, ranks: int, store: str, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Time the pipeline whose transformer runs over all ranks, plain and compiled, in one of the processes."""
    from diffusers import ContextParallelConfig

    device, dtype = device_and_dtype(given, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    generation = make(name, device, dtype, small=given.small)
    steps, repeats = steps_of(name, given)
    found: dict[str, Any] = {}
    try:
        config = ContextParallelConfig(ulysses_degree=ranks)
        generation.pipeline.transformer.enable_parallelism(config=config)
        run_pipeline(generation, SETTLING_STEPS[name])
        found["parallel"] = times([run_pipeline(generation, steps) for _ in range(repeats)])
        if "compiled" in given.rivals:
            found["parallel, compiled"] = time_compiled(generation, name, steps, repeats)
    # Anything: not every class has a plan, or a back end on this device. All ranks fail alike.
    except Exception as error:  # noqa: BLE001
        found["parallel"] = {"fault": first_line(error)}
    dist.destroy_process_group()
    return found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def free(device: str) -> None:
    """Give the memory of what was dropped back to the GPU."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
