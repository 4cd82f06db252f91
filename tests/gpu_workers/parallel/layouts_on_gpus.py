"""A program, not a test: single forwards in each layout of two GPUs, in bfloat16 and float32, beside plain diffusers.

    python layouts_on_gpus.py OUT_FOLDER [cuda|cpu]

For each layout and rank it writes ``<layout>-rank<N>.json``: for each case the relative error of every row against one
process in float32, and that of plain diffusers in bfloat16 on one GPU, which rounds as often. ``cpu`` is a dry run
without the large case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

SEED = 0
MODEL = {"heads": 8, "double_blocks": 2, "single_blocks": 2}
LAYOUTS = ("ulysses=2", "ring=2", "cfg=2")

# name: text tokens of each batch, latent height and width, rows of each batch
CASES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "usual": ((512,), 64, 64, 1),
    "prompt and negative": ((256,), 16, 16, 2),
    "negative of another length": ((301, 256), 14, 16, 1),
    "odd total": ((16,), 14, 14, 2),
    "odd text, odd image, three rows": ((15,), 14, 14, 3),
}


def inputs(tokens: int, height: int, width: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * 10_000 + height + width + rows)
    return {
        "prompt_embeds": torch.randn(rows, tokens, 4096, generator=generator),
        "pooled": torch.randn(rows, 768, generator=generator),
        "latents": torch.randn(rows, 16, height, width, generator=generator),
        # Exact in bfloat16, also times 1000: else the embedding of another time hides what layouts differ by.
        "timestep": torch.tensor([0.5, 0.25, 0.125])[:rows],
        "guidance": torch.tensor([4.0, 2.0, 1.0])[:rows],
    }


def run_rank(rank: int, layout: str, kind: str, folder: str) -> None:
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.family import TensorInfo
    from xditd.gpu_workers.models.skeletons import SkeletonCache
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees, parse_layout

    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cpu":
        torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, 2, f"{folder}/{layout}.store", device, degrees, kernels="auto")
    from direct_jobs import denoise_parts

    cache = SkeletonCache(started)
    rounded = {
        name: tensor.to(device, torch.bfloat16)
        for name, tensor in checkpoints.flux1_state_dict(SEED, **MODEL, dtype=torch.bfloat16).items()
    }
    facts: dict[str, Any] = {
        "attention": started.attention_backend,
        "fused": started.fused_attention,
        "canary": {},
        "cases": {case: {} for case in CASES if kind == "cuda" or case != "usual"},
    }
    exact = reference.transformer_from(rounded, dtype=torch.float32)
    plain = reference.transformer_from(rounded)
    for dtype in (torch.bfloat16, torch.float32):
        state = {name: tensor.to(dtype) for name, tensor in rounded.items()}
        plan = cache.plan({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        skeleton = plan.skeleton
        skeleton.plug(plan.bind(state), "a", plan.by_canonical_name(state))
        for case in facts["cases"]:
            lengths, height, width, rows = CASES[case]
            given = [inputs(tokens, height, width, rows) for tokens in lengths]
            # The first result of a case is the canary's business; from the second on the fast path is alone.
            results = [denoise_parts(skeleton, given).float() for _ in range(3)]
            expected = torch.cat([forward(exact, each, torch.float32, device) for each in given])
            one_gpu = torch.cat([forward(plain, each, torch.bfloat16, device) for each in given])
            facts["cases"][case][str(dtype).removeprefix("torch.")] = {
                "errors": [
                    reference.relative_error(one, other) for one, other in zip(results[1], expected, strict=True)
                ],
                "errors of one GPU": [
                    reference.relative_error(one, other) for one, other in zip(one_gpu, expected, strict=True)
                ],
                "same bits": torch.equal(results[1], results[2]),
                "sum": float(results[1].double().sum()),
            }
        fused = skeleton.module.fused
        if fused is not None:
            facts["canary"][str(dtype).removeprefix("torch.")] = {
                "refused": fused.canary.is_refused,
                "passed": len(fused.canary._passed),
            }
        skeleton.unplug()
    Path(folder, f"{layout}-rank{rank}.json").write_text(json.dumps(facts, indent=1))
    xfuser_start.stop()


@torch.no_grad()
def forward(model: Any, given: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One forward of plain diffusers."""
    from diffusers import FluxPipeline

    height, width = given["latents"].shape[2:]
    latents = given["latents"].to(device, dtype)
    packed = model(
        hidden_states=FluxPipeline._pack_latents(latents, *latents.shape),
        timestep=given["timestep"].to(device),
        guidance=given["guidance"].to(device),
        pooled_projections=given["pooled"].to(device, dtype),
        encoder_hidden_states=given["prompt_embeds"].to(device, dtype),
        txt_ids=torch.zeros(given["prompt_embeds"].shape[1], 3, device=device),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, torch.float32),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(packed, height * 8, width * 8, 8).float()


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "support"))  # which spawned ranks get, too
    device_kind = sys.argv[2] if len(sys.argv) > 2 else "cuda"
    for each_layout in LAYOUTS:
        torch.multiprocessing.spawn(run_rank, (each_layout, device_kind, sys.argv[1]), nprocs=2)
