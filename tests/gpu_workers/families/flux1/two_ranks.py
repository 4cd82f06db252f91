"""A program, not a test: run the parity cases on two gloo ranks and write what each rank got.

    python two_ranks.py OUT_FOLDER

Both ranks write ``rank<N>.safetensors`` with ``<case>/<round>`` tensors, and ``refused`` with the error's text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

SEED = 0
STEPS = 2
ROUNDS = 2
GUIDANCE = 3.5
ALIKE = (1.0, 0.9999, 0.9998)
"""Steps that a cache spares, but for the first."""
ODD_HEADS = {"heads": 3, "double_blocks": 1, "single_blocks": 1}

# name: text tokens, height, width, batch
CASES = {
    "all divide": (16, 128, 128, 1),
    "odd text, odd image, even total": (15, 112, 112, 1),
    "long odd text, odd image": (301, 112, 112, 1),
    "odd total, odd image": (16, 112, 112, 1),
    "odd total, odd text": (15, 128, 128, 1),
    "batch of two, odd total": (33, 64, 96, 2),
}


def inputs(tokens: int, height: int, width: int, batch: int) -> dict[str, torch.Tensor]:
    """The conditioning and noise of a case, the same in every process."""
    generator = torch.Generator().manual_seed(tokens * 10_000 + height + width)
    return {
        "prompt_embeds": torch.randn(batch, tokens, 4096, generator=generator),
        "pooled": torch.randn(batch, 768, generator=generator),
        "noise": torch.randn(batch, 16, height // 8, width // 8, generator=generator),
    }


# A mode makes the text one token longer for the ControlNet alone, so ranks split its tokens elsewhere.
CONTROLLED = {
    "odd text and image": (15, 112, 112, 1),
    "even text": (16, 64, 96, 1),
    "batch of two": (33, 64, 96, 2),
}


def controls_of(cache: Any, height: int, width: int, batch: int) -> Any:
    """Two unions of one architecture, and a ControlNet of another."""
    from direct_jobs import DirectControls
    from flux1_controlnets import MODES, comfyui_state

    from xditd.gpu_workers.models.entries import TensorInfo

    given: list[Any] = []
    for number, modes in enumerate((MODES, MODES, 0)):
        state = comfyui_state(number, modes=modes)
        taken = {id(model) for model, *_ in given}
        match = cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()}, taken=taken)
        match.model.plug(match.bind(state))
        latents = torch.randn(batch, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(number))
        given.append((match.model, latents, number if modes else None, 0.5))
    return DirectControls.of(*given)


def run_rank(rank: int, world_size: int, folder: str) -> None:
    import flux1_variants
    from safetensors.torch import save_file

    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.models.step_cache import StepCache
    from xditd.gpu_workers.parallel import rank_sync
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.errors import Unsupported

    torch.set_num_threads(1)
    layout = xfuser_start.start(rank, world_size, f"{folder}/store", torch.device("cpu"))
    from direct_jobs import denoise, generate, generate_from, plugged

    facts: dict[str, object] = {
        "agree on all true": rank_sync.agree(True),
        "agree when rank 1 is false": rank_sync.agree(rank == 0),
        "rank 0 stops": rank_sync.broadcast_stop(rank == 0),
        "rank 1 alone stops": rank_sync.broadcast_stop(rank == 1),
        "degrees": layout.degrees.named(),
    }
    cache = ModelCache(layout)
    results: dict[str, torch.Tensor] = {}
    for label, guidance in (("dev", True), ("schnell", False)):
        state = checkpoints.flux1_state_dict(SEED, guidance=guidance)
        model = plugged(cache, state)
        for case, (tokens, height, width, batch) in CASES.items():
            for attempt in range(ROUNDS if guidance else 1):
                results[f"{label}/{case}/{attempt}"] = generate(
                    model,
                    **inputs(tokens, height, width, batch),
                    height=height,
                    width=width,
                    steps=STEPS,
                    guidance_scale=GUIDANCE,
                )
        tokens, height, width, batch = CASES["odd total, odd image"]
        given = inputs(tokens, height, width, batch)
        results[f"{label}/denoise"] = denoise(
            model,
            latents=given["noise"],
            timestep=torch.full((batch,), 0.7),
            prompt_embeds=given["prompt_embeds"],
            pooled=given["pooled"],
            guidance=torch.full((batch,), GUIDANCE),
        )
        for attempt in range(ROUNDS):
            steps = StepCache(0.1)
            results[f"{label}/cached/{attempt}"] = generate(
                model, **given, height=height, width=width, steps=len(ALIKE), sigmas=ALIKE, step_cache=steps
            )
            facts[f"{label} reused"] = steps.reused
        results[f"{label}/not cached"] = generate(
            model, **given, height=height, width=width, steps=len(ALIKE), sigmas=ALIKE
        )
        try:
            generate(model, **inputs(1, 112, 112, 1), height=112, width=112, steps=1)
        except Unsupported as error:
            facts[f"{label} refuses one text token"] = error.detail
    for threshold in (0.6, 0.4):
        # By itself rank 0 would see no change, and rank 1 one of 1.0: together it is 0.5.
        steps = StepCache(threshold)
        steps.decide(range(1), torch.ones(1, 4, 8))
        facts[f"alike below {threshold}"] = steps.decide(range(1), torch.full((1, 4, 8), 1.0 + rank))
    for channels in (64, 128, 384):
        noise = flux1_variants.numbers(3, 1, 16, 14, 14)
        pictures = flux1_variants.pictures(channels, 112, 112)
        given = {**flux1_variants.text(1), **pictures}
        variant = plugged(cache, flux1_variants.state_of(channels))
        results[f"{channels} channels"] = generate_from(variant, given, noise, steps=STEPS, height=112, width=112)
    transformer = plugged(cache, checkpoints.flux1_state_dict(SEED))
    for case, (tokens, height, width, batch) in CONTROLLED.items():
        results[f"controls/{case}"] = generate(
            transformer,
            **inputs(tokens, height, width, batch),
            height=height,
            width=width,
            steps=STEPS,
            controls=controls_of(cache, height, width, batch),
        )
    odd_heads = plugged(cache, checkpoints.flux1_state_dict(SEED, **ODD_HEADS))
    facts["degrees of three heads"] = odd_heads.layout.degrees.named()
    tokens, height, width, batch = CASES["odd total, odd image"]
    results["three heads"] = generate(
        odd_heads,
        **inputs(tokens, height, width, batch),
        height=height,
        width=width,
        steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, f"{folder}/rank{rank}.safetensors")
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    xfuser_start.stop()


if __name__ == "__main__":
    sys.path += [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3] / "checkpoints")]
    from forked_ranks import fork_ranks

    fork_ranks(run_rank, 2, 2, sys.argv[1])
