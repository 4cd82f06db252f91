"""A program, not a test: denoise a few batches in every kind of layout, on gloo ranks, and write what each rank got.

    python many_layouts.py OUT_FOLDER

Each rank of each layout writes ``<layout>/rank<N>.safetensors`` with ``<case>/<round>`` tensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

SEED = 0
ROUNDS = 2
GUIDANCE = 3.5
MODEL = {"heads": 4, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 32}

LAYOUTS = (
    "ring=2",
    "cfg=2",
    "ring=3",
    "ulysses=2,ring=2",
    "ulysses=2,cfg=2",
    "ulysses=4,ring=2",
    "ulysses=2,ring=2,cfg=2",
)

# name: text tokens, latent height, latent width, rows
CASES = {
    "all divide": (16, 16, 16, 1),
    "odd text, odd image": (15, 14, 14, 1),
    "odd total": (16, 14, 14, 2),
    "odd text, three rows": (13, 8, 12, 3),
}

ALIKE = (1.0, 0.9999, 0.9998)
"""Steps of a job on the last case; a step cache spares all but the first."""

# name: the cases of one latent size whose rows share a request
JOINED = {
    "other lengths": ("odd text, odd image", "odd total"),
    "other lengths, the longer first": ("odd total", "odd text, odd image"),
}


def inputs(tokens: int, height: int, width: int, rows: int) -> dict[str, torch.Tensor]:
    """The tensors of a case, the same in every process; each row has a sigma and a guidance of its own."""
    generator = torch.Generator().manual_seed(tokens * 10_000 + height + width + rows)
    return {
        "prompt_embeds": torch.randn(rows, tokens, MODEL["context_dim"], generator=generator),
        "pooled": torch.randn(rows, MODEL["pooled_dim"], generator=generator),
        "latents": torch.randn(rows, 16, height, width, generator=generator),
        "timestep": torch.linspace(0.7, 0.4, rows),
        "guidance": torch.linspace(GUIDANCE, 1.0, rows),
    }


def run_rank(rank: int, layout: str, state: dict[str, torch.Tensor], folder: Path) -> None:
    from direct_jobs import denoise_parts, generate, plugged
    from safetensors.torch import save_file

    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.models.step_cache import StepCache
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees, parse_layout

    torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, degrees.world_size, str(folder / "store"), torch.device("cpu"), degrees)
    model = plugged(ModelCache(started), state)
    results = {
        f"{name}/{attempt}": denoise_parts(model, [inputs(*CASES[case]) for case in cases])
        for name, cases in ({case: (case,) for case in CASES} | JOINED).items()
        for attempt in range(ROUNDS)
    }
    given, cache = inputs(*CASES["odd text, three rows"]), StepCache(0.1)
    results["cached"] = generate(
        model,
        prompt_embeds=given["prompt_embeds"],
        pooled=given["pooled"],
        noise=given["latents"],
        height=8 * given["latents"].shape[2],
        width=8 * given["latents"].shape[3],
        steps=len(ALIKE),
        sigmas=ALIKE,
        step_cache=cache,
    )
    results["reused"] = torch.tensor(cache.reused)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"rank{rank}.safetensors")
    xfuser_start.stop()


def main(out: Path) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    from forked_ranks import fork_ranks

    from xditd.client.demo import checkpoints
    from xditd.ipc.degrees import Degrees, parse_layout

    state = checkpoints.flux1_state_dict(SEED, **MODEL)
    for layout in LAYOUTS:
        folder = out / layout
        folder.mkdir()
        fork_ranks(run_rank, Degrees(**parse_layout(layout)).world_size, layout, state, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
