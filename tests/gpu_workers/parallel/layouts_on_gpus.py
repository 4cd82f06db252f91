"""A program, not a test: single forwards in each layout of two GPUs, in bfloat16 and float32, beside plain diffusers.

    python layouts_on_gpus.py OUT_FOLDER [cuda|cpu]

For each layout and rank it writes ``<layout>-rank<N>.json``: for each case the relative error of every row against one
process in float32, and that of plain diffusers in bfloat16 on one GPU, which rounds as often. ``mixed`` has the same of
a model with three attention heads, which takes turns with the usual one. ``cpu`` is a dry run without the large case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from xditd.gpu_workers.models.cached_model import CachedModel

SEED = 0
HEADS = 8
ODD_HEADS = 3
BLOCKS = {"double_blocks": 2, "single_blocks": 2}
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
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees, parse_layout

    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cpu":
        torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, 2, f"{folder}/{layout}.store", device, degrees, kernels="auto")
    cache = ModelCache(started)
    bfloat16 = make_weights(HEADS, device)
    facts: dict[str, Any] = {
        "attention": started.attention_backend,
        "fused": started.fused_attention,
        "check": {},
        "cases": {case: {} for case in CASES if kind == "cuda" or case != "usual"},
    }

    def lend(state: dict[str, torch.Tensor], owner: str = "a") -> CachedModel:
        match = cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        match.model.plug(match.bind(state), owner, match.by_canonical_name(state))
        return match.model

    models = Models(bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        model = lend({name: tensor.to(dtype) for name, tensor in bfloat16.items()})
        for case in facts["cases"]:
            # The first result of a case is the check's business; from the second on the fast path is alone.
            results = [denoise(model, case) for _ in range(3)]
            facts["cases"][case][str(dtype).removeprefix("torch.")] = models.compare(case, results[1:])
        fused = model.module.fused
        if fused is not None:
            facts["check"][str(dtype).removeprefix("torch.")] = {
                "refused": fused.check.is_refused,
                "passed": len(fused.check._passed),
            }
        model.unplug()
    del models
    facts["mixed"] = run_mixed(lend, facts["cases"], bfloat16, device)
    Path(folder, f"{layout}-rank{rank}.json").write_text(json.dumps(facts, indent=1))
    xfuser_start.stop()


def run_mixed(
    lend: Callable[..., CachedModel], cases: Iterable[str], usual: dict[str, torch.Tensor], device: torch.device
) -> dict[str, Any]:
    """Run a model whose heads do not divide by two in turns with the usual one, in the same group."""
    odd = make_weights(ODD_HEADS, device)
    found: dict[str, Any] = {"cases": {case: {} for case in cases}}
    models = Models(odd)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        even, model = (
            lend({name: tensor.to(dtype) for name, tensor in state.items()}, owner)
            for owner, state in (("even", usual), ("odd", odd))
        )
        for case in found["cases"]:
            denoise(even, case)  # with fused kernels, this is the check's first
            alone = denoise(even, case)
            results = []
            for _ in range(2):
                results.append(denoise(model, case))
                again = denoise(even, case)
            found["cases"][case][name] = models.compare(case, results)
            found["cases"][case][name]["the usual one gives the same bits"] = torch.equal(alone, again)
        found[name] = {
            "degrees": model.layout.degrees.named(),
            "attention": model.attention_backend,
            "fused": model.module.fused is not None,
        }
        even.unplug()
        model.unplug()
    return found


def make_weights(heads: int, device: torch.device) -> dict[str, torch.Tensor]:
    from xditd.client.demo import checkpoints

    state = checkpoints.flux1_state_dict(SEED, heads=heads, **BLOCKS, dtype=torch.bfloat16)
    return {name: tensor.to(device, torch.bfloat16) for name, tensor in state.items()}


def denoise(model: CachedModel, case: str) -> torch.Tensor:
    from direct_jobs import denoise_parts

    lengths, height, width, rows = CASES[case]
    return denoise_parts(model, [inputs(tokens, height, width, rows) for tokens in lengths]).float()


class Models:
    """Plain diffusers on one GPU with the same weights, exact and in bfloat16."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        from xditd.gpu_workers.families.flux1 import reference

        self._device = next(iter(state.values())).device
        self._exact = reference.transformer_from(state, dtype=torch.float32)
        self._rounded = reference.transformer_from(state)

    def compare(self, case: str, results: list[torch.Tensor]) -> dict[str, Any]:
        """Say how far two results of a case are from exact ones, and from each other."""
        from xditd.gpu_workers.families.flux1 import reference

        lengths, *size = CASES[case]
        given = [inputs(tokens, *size) for tokens in lengths]
        expected = torch.cat([forward(self._exact, each, torch.float32, self._device) for each in given])
        one_gpu = torch.cat([forward(self._rounded, each, torch.bfloat16, self._device) for each in given])
        first, second = results
        return {
            "errors": [reference.relative_error(one, other) for one, other in zip(first, expected, strict=True)],
            "errors of one GPU": [
                reference.relative_error(one, other) for one, other in zip(one_gpu, expected, strict=True)
            ],
            "same bits": torch.equal(first, second),
            "sum": float(first.double().sum()),
        }


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
