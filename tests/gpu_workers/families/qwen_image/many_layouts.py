"""A program, not a test: call and sample Qwen-Image in layouts on gloo ranks, and write what each rank got.

    python many_layouts.py OUT_FOLDER LAYOUT...

Each rank of each of these layouts writes ``<layout>/rank<N>.safetensors`` with ``<case>/<round>/<row>`` tensors.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[3]
sys.path += [str(TESTS / "checkpoints"), str(TESTS / "gpu_workers" / "support")]

import qwen_image_models  # noqa: E402 - from one of these folders

SEED = 0
ROUNDS = 2
STEPS = 2
CONFIG = replace(qwen_image_models.BASE, hidden=768, blocks=1)
"""Six heads: Ulysses may have degrees 2 and 3."""

LAYOUTS = ("ulysses=2", "cfg=2", "ulysses=3", "ring=3", "cfg=2,ulysses=2", "ulysses=4")

# name: the arguments of qwen_image_models.inputs, and the variant
CALLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "all divide": ((1, 32, (8, 8)), "class"),
    "odd text, odd sides": ((1, 7, (5, 9)), "class"),
    "batch of two, one text padded": ((2, 41, (4, 7), (), (41, 13)), "class"),
    "batch of three, references": ((3, 9, (4, 6), ((3, 5), (2, 4)), (9, 5, 7)), "class"),
    "batch of two, no token of one text counts": ((2, 9, (4, 6), (), (0, 9)), "class"),
    "no token of a text counts": ((1, 9, (4, 6), (), (0,)), "class"),
    "references at timestep zero": ((1, 9, (4, 7), ((3, 5),)), "zero_cond_t"),
}

# name: batch, text tokens of prompts and negatives, size, guidance
SAMPLES: dict[str, tuple[int, int, int | None, tuple[int, int], float]] = {
    "plain": (1, 40, None, (10, 18), 1.0),
    "guided": (1, 40, 7, (16, 16), 2.0),
    "guided batch of two": (2, 9, 33, (10, 14), 2.0),
}


def sample(case: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """Conditioning, noise and guidance, the same in every process; of two texts the second one is padded."""
    batch, tokens, negatives, size, scale = SAMPLES[case]
    generator = torch.Generator().manual_seed(len(case))
    conditioning = {}
    for name, length in (("prompt_embeds", tokens), ("negative_prompt_embeds", negatives)):
        if length is not None:
            conditioning[name] = torch.randn(batch, length, CONFIG.text_channels, generator=generator)
            conditioning[f"{name}_mask"] = qwen_image_models.mask((length, length - 4)[:batch], length)
    return conditioning, torch.randn(batch, 16, *size, generator=generator), scale


def run_rank(rank: int, layout: str, state: dict[str, torch.Tensor], folder: Path) -> None:
    import direct_jobs
    from safetensors.torch import save_file

    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.models.operations import Inputs
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees, parse_layout

    torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, degrees.world_size, str(folder / "store"), torch.device("cpu"), degrees)
    match = ModelCache(started).match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    model: Any = match.model
    model.plug(match.bind(state))
    results: dict[str, torch.Tensor] = {}
    for attempt in range(ROUNDS):
        for case, (given, variant) in CALLS.items():
            (tree,) = direct_jobs.call(model, [Inputs(qwen_image_models.inputs(*given))], variant=variant)
            results |= {f"{case}/{attempt}/{row}": tensor for row, tensor in enumerate(tree[0])}
        for case in SAMPLES:
            conditioning, noise, scale = sample(case)
            latents = direct_jobs.generate_from(
                model,
                conditioning,
                noise,
                height=noise.shape[2] * 8,
                width=noise.shape[3] * 8,
                steps=STEPS,
                guidance_scale=scale,
            )
            results |= {f"{case}/{attempt}/{row}": tensor for row, tensor in enumerate(latents)}
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"rank{rank}.safetensors")
    xfuser_start.stop()


def main(out: Path, *layouts: str) -> None:
    from forked_ranks import fork_ranks

    from xditd.ipc.degrees import Degrees, parse_layout

    state = qwen_image_models.state_dict(SEED, CONFIG)
    for layout in layouts:
        folder = out / layout
        folder.mkdir()
        fork_ranks(run_rank, Degrees(**parse_layout(layout)).world_size, layout, state, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
