"""A program, not a test: call and sample Z-Image in layouts on gloo ranks, and write what each rank got.

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

import z_image_models  # noqa: E402 - from one of these folders

SEED = 0
ROUNDS = 2
STEPS = 2
GUIDANCE = 1.0
"""More of it multiplies what roundings differ by."""
SHIFT = 6.0
CONFIG = replace(z_image_models.SMALL, hidden=768, layers=1, refiners=1)
"""Six heads: Ulysses may have degrees 2 and 3."""

LAYOUTS = ("ulysses=2", "cfg=2", "ulysses=3", "ring=3", "ulysses=2,ring=2")

# name: text tokens of each row, latent height and width of each
CALLS: dict[str, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = {
    "all divide": ((32,), ((16, 16),)),
    "odd text, padded image": ((7,), ((6, 10),)),
    "equal texts": ((40, 40), ((8, 12),) * 2),
    "unequal texts": ((5, 70), ((8, 12),) * 2),
    "all unequal": ((20, 90, 33), ((8, 12), (4, 4), (16, 16))),
}

# name: text tokens of prompts and negatives, latent height and width
SAMPLES: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {
    "Base": ((40, 7), (16, 16)),
    "Base, batch of two": ((40, 70, 7, 7), (8, 12)),
}


def sample(case: str) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor]:
    """Conditioning and noise, the same in every process."""
    texts, size = SAMPLES[case]
    embeds = z_image_models.inputs(texts, (size,))["cap_feats"]
    batch = len(texts) // 2
    noise = torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(len(case)))
    return {"prompt_embeds": embeds[:batch], "negative_prompt_embeds": embeds[batch:]}, noise


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
        for case, given in CALLS.items():
            (tree,) = direct_jobs.call(model, [Inputs(z_image_models.inputs(*given))])
            results |= {f"{case}/{attempt}/{row}": tensor for row, tensor in enumerate(tree[0])}
        for case in SAMPLES:
            conditioning, noise = sample(case)
            latents = direct_jobs.generate_from(
                model,
                conditioning,
                noise,
                height=noise.shape[2] * 8,
                width=noise.shape[3] * 8,
                steps=STEPS,
                guidance_scale=GUIDANCE,
            )
            results |= {f"{case}/{attempt}/{row}": tensor for row, tensor in enumerate(latents)}
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"rank{rank}.safetensors")
    xfuser_start.stop()


def main(out: Path, *layouts: str) -> None:
    from forked_ranks import fork_ranks

    from xditd.ipc.degrees import Degrees, parse_layout

    state = z_image_models.state_dict(SEED, CONFIG)
    for layout in layouts:
        folder = out / layout
        folder.mkdir()
        fork_ranks(run_rank, Degrees(**parse_layout(layout)).world_size, layout, state, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
