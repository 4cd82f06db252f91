"""The same jobs without the daemon, as users run them: load a folder of diffusers, denoise, decode.

    python benchmarks/rival.py diffusers --files FOLDER --out FILE
    python benchmarks/rival.py xfuser --ranks 2 --files FOLDER --out FILE
    python benchmarks/rival.py context-parallel --ranks 2 --files FOLDER --out FILE

``diffusers`` is one process, ``xfuser`` its Flux wrapper with Ulysses, ``context-parallel`` diffusers' own
``enable_parallelism`` with Ulysses. All run in eager mode. Files come from ``checkpoint_files.py``; latents after a few
steps are left in their folder, for what others are compared with. Seconds are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import checkpoint_files
import scales
import torch
from measuring import Report, add_arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time loading and jobs in-process, and write latents.")
    parser.add_argument("rival", choices=tuple(LOADERS))
    add_arguments(parser)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--began", type=float, default=time.time(), help="when the program was started, as time.time()")
    return parser


@dataclass(frozen=True)
class Rank:
    """One process of a rival. ``store`` is a file through which ranks meet."""

    given: argparse.Namespace
    number: int
    store: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number) if self.given.device == "cuda" else torch.device("cpu")

    @property
    def transformer_folder(self) -> Path:
        return self.given.files / checkpoint_files.DIFFUSERS / "transformer"

    @property
    def options(self) -> dict[str, Any]:
        """How ``from_pretrained`` is called: straight to the device, which is its fastest way there."""
        dtype = scales.dtype_on(self.given.device)
        return {"torch_dtype": dtype, "device_map": {"": str(self.device)}, "local_files_only": True}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def start_diffusers(rank: Rank) -> Callable[[], Any]:
    from diffusers import FluxTransformer2DModel

    return lambda: FluxTransformer2DModel.from_pretrained(rank.transformer_folder, **rank.options)


def start_xfuser(rank: Rank) -> Callable[[], Any]:
    from xditd.gpu_workers.process import xfuser_start

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
    """Load, make a first image, then time jobs; rank 0 leaves latents in the folder of the files."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    from xditd.gpu_workers.families.flux1 import reference

    given, scale = rank.given, scales.named(rank.given)
    load = LOADERS[given.rival](rank)
    inputs = load_file(given.files / checkpoint_files.INPUTS, device=str(rank.device))
    rank.wait()
    found: dict[str, Any] = {"started_s": time.time() - given.began}

    with torch.no_grad():
        pipeline, found["load_s"] = timed(rank, lambda: make_pipeline(load()))
        vae_folder = given.files / checkpoint_files.DIFFUSERS / "vae"
        vae, found["load_vae_s"] = timed(rank, lambda: AutoencoderKL.from_pretrained(vae_folder, **rank.options))
        first, found["first_job_s"] = timed(rank, lambda: job(pipeline, scale, inputs, scale.steps))
        _, found["first_decode_s"] = timed(rank, lambda: reference.reference_decode(vae, first))
        found["job_s"] = [
            timed(rank, lambda: job(pipeline, scale, inputs, scale.steps))[1] for _ in range(given.repeats)
        ]
        found["decode_s"] = [
            timed(rank, lambda: reference.reference_decode(vae, first))[1] for _ in range(given.repeats)
        ]
        latents = job(pipeline, scale, inputs, scale.parity_steps)
        found["same_bits_again"] = torch.equal(latents, job(pipeline, scale, inputs, scale.parity_steps))
    if rank.number == 0:
        save_file({"latents": latents.float().cpu().contiguous()}, latents_file(given.files, given.rival, given.ranks))
    return found


def latents_file(files: Path, rival: str, ranks: int) -> Path:
    return files / f"latents_{rival}_{ranks}.safetensors"


def timed(rank: Rank, action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = action()
    rank.wait()
    return result, time.perf_counter() - started


def job(pipeline: Any, scale: scales.Scale, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
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


def run_rank(number: int, given: argparse.Namespace, folder: str) -> None:
    if given.device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // given.ranks))
    found = measure(Rank(given, number, f"{folder}/store"))
    Path(folder, f"rank{number}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def slowest(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One rival's figures from its ranks': for each run what the slowest one took."""
    whole: dict[str, Any] = {}
    for name in found[0]:
        each = [rank[name] for rank in found]
        if name == "same_bits_again":
            whole[name] = all(each)
        else:
            whole[name] = [max(run) for run in zip(*each, strict=True)] if isinstance(each[0], list) else max(each)
    return whole


def main() -> None:
    given = build_parser().parse_args()
    report = Report(given.out)
    with tempfile.TemporaryDirectory(prefix="xditd-rival-") as folder:
        if given.ranks == 1:
            run_rank(0, given, folder)
        else:
            # Daemonic processes end with this one, whatever ends it.
            ranks = torch.multiprocessing.start_processes(
                run_rank, (given, folder), nprocs=given.ranks, join=False, daemon=True, start_method="spawn"
            )
            while not ranks.join():
                pass
        found = [json.loads(Path(folder, f"rank{number}.json").read_text()) for number in range(given.ranks)]
    report.add(rival=given.rival, ranks=given.ranks, **slowest(found))


if __name__ == "__main__":
    main()
