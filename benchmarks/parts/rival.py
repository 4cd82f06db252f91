"""Time the same jobs without the daemon, in diffusers or xDiT alone: load a folder, denoise, decode.

    python benchmarks/run.py rival diffusers --files FOLDER
    python benchmarks/run.py rival xfuser --workers 2 --files FOLDER
    python benchmarks/run.py rival context-parallel --workers 2 --files FOLDER

``diffusers`` is one process, ``xfuser`` its Flux wrapper with Ulysses, ``context-parallel`` diffusers' own
``enable_parallelism`` with Ulysses. All run in eager mode; the suite compares the daemon with them. Latents after a few
steps are written to FOLDER, for comparison with other parts. Seconds are those of the slowest rank.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flux
import torch
from measuring import Report, add_device, need_gpus, print_machine, print_table, run_on_ranks, synchronize
from parts import files, loads

SHOWS_MACHINE = True
"""This part prints the machine itself, at the end, because its own start is timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rival", choices=tuple(LOADERS))
    add_device(parser)
    parser.add_argument("--workers", "--ranks", dest="ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=Path, required=True, help="folder of the part files, written if needed")
    parser.add_argument(
        "--began", type=float, help="time.time() at which the suite started this part, with the files written"
    )


@dataclass(frozen=True)
class Rank:
    """One rank of a program that the daemon is compared with."""

    given: argparse.Namespace
    number: int
    store: str

    @property
    def device(self) -> torch.device:
        return flux.device_of(self.given, self.number)

    @property
    def transformer_folder(self) -> Path:
        return self.given.files / files.DIFFUSERS / "transformer"

    @property
    def options(self) -> dict[str, Any]:
        return loads.options(self.given, self.number)


def start_diffusers(rank: Rank) -> Callable[[], Any]:
    from diffusers import FluxTransformer2DModel

    return lambda: FluxTransformer2DModel.from_pretrained(rank.transformer_folder, **rank.options)


def import_all_of_xfuser(device: torch.device) -> None:
    """Import xfuser with its wrappers of models, before a rank starts, which would import less."""
    from xditd.gpu_workers.process import xfuser_cpu

    if device.type == "cuda":
        torch.cuda.set_device(device)  # or the import opens a context on the first GPU
    with xfuser_cpu.importable() if device.type == "cpu" else nullcontext():
        importlib.import_module("xfuser")


def start_xfuser(rank: Rank) -> Callable[[], Any]:
    from xditd.gpu_workers.process import xfuser_start

    import_all_of_xfuser(rank.device)
    xfuser_start.start(rank.number, rank.given.ranks, rank.store, rank.device)
    from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

    return lambda: xFuserFlux1Transformer2DWrapper.from_pretrained(rank.transformer_folder, **rank.options)


def start_context_parallel(rank: Rank) -> Callable[[], Any]:
    import torch.distributed as dist
    from diffusers import ContextParallelConfig, FluxTransformer2DModel

    if rank.device.type == "cuda":
        torch.cuda.set_device(rank.device)
    for backend in ("GLOO", "NCCL"):
        os.environ[f"{backend}_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if rank.device.type == "cuda" else "gloo",
        store=dist.FileStore(rank.store, rank.given.ranks),
        rank=rank.number,
        world_size=rank.given.ranks,
    )

    def load() -> Any:
        transformer = FluxTransformer2DModel.from_pretrained(rank.transformer_folder, **rank.options)
        if rank.device.type == "cuda":
            transformer.set_attention_backend("_native_cudnn")  # as xfuser chooses on these GPUs
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=rank.given.ranks))
        return transformer

    return load


LOADERS = {"diffusers": start_diffusers, "xfuser": start_xfuser, "context-parallel": start_context_parallel}


def measure(rank: Rank) -> dict[str, Any]:
    """Load, make a first image, then time jobs; rank 0 writes latents to the folder of the files."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    from xditd.gpu_workers.families.flux1 import reference

    given, scale = rank.given, flux.scale_of(rank.given)
    load = LOADERS[given.rival](rank)
    inputs = load_file(given.files / files.INPUTS, device=str(rank.device))
    synchronize(rank.device)
    found: dict[str, Any] = {"started_s": time.time() - given.began}

    with torch.no_grad():
        pipeline, found["load_s"] = timed(rank, lambda: make_pipeline(load()))
        vae_folder = given.files / files.DIFFUSERS / "vae"
        vae, found["load_vae_s"] = timed(rank, lambda: AutoencoderKL.from_pretrained(vae_folder, **rank.options))
        first, found["first_job_s"] = timed(rank, lambda: job(pipeline, scale, inputs, scale.steps))
        _, found["first_decode_s"] = timed(rank, lambda: reference.reference_decode(vae, first))
        for name, action in (
            ("job_s", lambda: job(pipeline, scale, inputs, scale.steps)),
            ("decode_s", lambda: reference.reference_decode(vae, first)),
        ):
            found[name] = [timed(rank, action)[1] for _ in range(given.repeats)]
        latents = job(pipeline, scale, inputs, scale.parity_steps)
        found["same_bits_again"] = torch.equal(latents, job(pipeline, scale, inputs, scale.parity_steps))
    if rank.number == 0:
        target = given.files / f"latents_{given.rival}_{given.ranks}.safetensors"
        save_file({"latents": latents.float().cpu().contiguous()}, target)
    return found


def timed(rank: Rank, action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = action()
    synchronize(rank.device)
    return result, time.perf_counter() - started


def job(pipeline: Any, scale: flux.Scale, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    from diffusers import FluxPipeline

    noise = inputs["noise"]
    packed = pipeline(
        prompt_embeds=inputs["prompt_embeds"],
        pooled_prompt_embeds=inputs["pooled_prompt_embeds"],
        latents=FluxPipeline._pack_latents(noise, *noise.shape),
        height=scale.pixels,
        width=scale.pixels,
        num_inference_steps=steps,
        guidance_scale=3.5,
        output_type="latent",
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(packed, scale.pixels // 8, scale.pixels // 8, 1)


def make_pipeline(transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_rank(number: int, ranks: int, store: str, given: argparse.Namespace) -> dict[str, Any]:
    if given.device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    found = measure(Rank(given, number, store))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return found


def slowest(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the ranks' figures: for each run the time of the slowest rank."""
    whole: dict[str, Any] = {}
    for name in found[0]:
        each = [rank[name] for rank in found]
        if name == "same_bits_again":
            whole[name] = all(each)
        else:
            whole[name] = [max(run) for run in zip(*each, strict=True)] if isinstance(each[0], list) else max(each)
    return whole


def run(given: argparse.Namespace, report: Report) -> None:
    if given.began is None:
        need_gpus(f"rival {given.rival}", given.ranks, given.device)
        files.ensure(given.files, given)
        given.began = time.time()
    found = run_on_ranks(run_rank, given.ranks, given, is_one_here=True)
    report.add(rival=given.rival, ranks=given.ranks, **slowest(found))
    rows = [(name, f"{statistics.median(report.found[name]):.3f} s") for name in ("job_s", "decode_s")]
    print_machine(report.found["machine"])
    print_table(f"{given.rival}, {given.ranks} rank(s), medians", rows)
