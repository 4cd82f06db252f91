"""The same job without the daemon, in a process of its own: plain diffusers, or xfuser as its users run it.

    python benchmarks/rival.py diffusers --inputs IN --latents OUT --steps 28
    python benchmarks/rival.py xfuser --ranks 2 --inputs IN --latents OUT --steps 28

Makes the seeded weights of ``flux_weights``, converts them with diffusers' own converter, and prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import flux_weights
import torch


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time one job in-process and write its latents.")
    parser.add_argument("rival", choices=("diffusers", "xfuser"))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny transformer instead of FLUX.1-dev's size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--parity-steps", type=int, default=12)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def run(pipeline: Any, given: argparse.Namespace, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[float]]:
    """Latents after ``parity_steps``, and the seconds that ``steps`` steps took, for each repeat after a warm-up."""
    from diffusers import FluxPipeline

    noise = inputs["noise"]
    side = given.pixels // 8

    def job(steps: int) -> torch.Tensor:
        packed = pipeline(
            prompt_embeds=inputs["prompt_embeds"],
            pooled_prompt_embeds=inputs["pooled_prompt_embeds"],
            latents=FluxPipeline._pack_latents(noise, *noise.shape),
            height=given.pixels,
            width=given.pixels,
            num_inference_steps=steps,
            guidance_scale=3.5,
            output_type="latent",
            return_dict=False,
        )[0]
        if given.device == "cuda":
            torch.cuda.synchronize()
        return FluxPipeline._unpack_latents(packed, side, side, 1)

    latents = job(given.parity_steps)
    took = []
    for _ in range(given.repeats):
        started = time.perf_counter()
        job(given.steps)
        took.append(time.perf_counter() - started)
    return latents, took


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


def load_inputs(given: argparse.Namespace, device: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(given.inputs, device=device)


def weights(given: argparse.Namespace, device: str) -> dict[str, torch.Tensor]:
    size = flux_weights.SMALL if given.small else flux_weights.FULL
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    return flux_weights.state_dict(size, dtype, device, given.seed)


def run_diffusers(given: argparse.Namespace) -> dict[str, Any]:
    from xditd.gpu_workers import reference

    device = "cuda:0" if given.device == "cuda" else "cpu"
    with torch.no_grad():
        transformer = reference.transformer_from(weights(given, device))
        latents, took = run(make_pipeline(transformer), given, load_inputs(given, device))
    save(latents, given.latents)
    return {"seconds": took}


def run_xfuser_rank(rank: int, given: argparse.Namespace, store: str, out: Any) -> None:
    from xditd.gpu_workers import xfuser_start

    device = torch.device("cuda", rank) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // given.ranks))
    layout = xfuser_start.start(rank, given.ranks, store, device)

    from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

    from xditd.gpu_workers import reference

    state = weights(given, str(device))
    plain = reference.transformer_from(state)
    with torch.device("meta"):
        wrapped = xFuserFlux1Transformer2DWrapper(**{k: v for k, v in plain.config.items() if not k.startswith("_")})
    wrapped.load_state_dict(plain.state_dict(), assign=True)
    with torch.no_grad():
        latents, took = run(make_pipeline(wrapped.eval()), given, load_inputs(given, str(device)))
    if rank == 0:
        save(latents, given.latents)
        out.put(json.dumps({"seconds": took, "attention": layout.attention_backend}))
    xfuser_start.stop()


def run_xfuser(given: argparse.Namespace) -> dict[str, Any]:
    import torch.multiprocessing as multiprocessing

    spawn = multiprocessing.get_context("spawn")
    out = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            spawn.Process(target=run_xfuser_rank, args=(rank, given, f"{folder}/store", out))
            for rank in range(given.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"xfuser ranks ended with {[process.exitcode for process in ranks]}")
    found: dict[str, Any] = json.loads(out.get(timeout=10))
    return found


def save(latents: torch.Tensor, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"latents": latents.float().cpu().contiguous()}, path)


if __name__ == "__main__":
    arguments = build_parser().parse_args()
    print(json.dumps(run_diffusers(arguments) if arguments.rival == "diffusers" else run_xfuser(arguments)))
