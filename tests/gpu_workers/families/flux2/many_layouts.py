"""A program, not a test: call and sample FLUX.2 in layouts on gloo ranks, and write what each rank got.

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

import flux2_models  # noqa: E402 - from one of these folders

SEED = 0
ROUNDS = 2
STEPS = 2
CONFIG = replace(flux2_models.KLEIN, hidden=768, double_blocks=1, single_blocks=1)
"""Six heads: Ulysses may have degrees 2 and 3."""

LAYOUTS = ("ulysses=2", "cfg=2", "ulysses=3", "ring=3", "cfg=2,ulysses=2", "ulysses=4")

# name: rows, text tokens, rows and columns of the image, references
CALLS: dict[str, tuple[int, int, tuple[int, int], tuple[tuple[int, int], ...]]] = {
    "all divide": (1, 32, (8, 8), ()),
    "odd text, odd sides": (1, 7, (5, 9), ()),
    "batch of two": (2, 41, (4, 7), ()),
    "batch of three, references": (3, 9, (4, 6), ((3, 5), (2, 4))),
}

# name: batch, text tokens of prompts and negatives, size, guidance, references, whether their keys are kept
SAMPLES: dict[str, tuple[int, int, int | None, tuple[int, int], float, tuple[tuple[int, int], ...], bool]] = {
    "distilled": (1, 40, None, (5, 9), 1.0, (), False),
    "base": (1, 40, 7, (8, 8), 2.0, (), False),
    "base, batch of two, a reference": (2, 9, 33, (5, 7), 2.0, ((3, 5),), False),
    "KV cache": (1, 9, None, (5, 7), 1.0, ((3, 5), (4, 4)), True),
    "KV cache, batch of two": (2, 9, None, (4, 4), 1.0, ((3, 3),), True),
}


def sample(case: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Conditioning and noise, the same in every process."""
    batch, tokens, negatives, size, _, references, _ = SAMPLES[case]
    generator = torch.Generator().manual_seed(len(case))
    lengths = {"prompt_embeds": tokens, "negative_prompt_embeds": negatives}
    conditioning: dict[str, Any] = {
        name: torch.randn(batch, length, CONFIG.context_channels, generator=generator)
        for name, length in lengths.items()
        if length is not None
    }
    if references:
        conditioning["reference_latents"] = [torch.randn(128, *each, generator=generator) for each in references]
    return conditioning, torch.randn(batch, 128, *size, generator=generator)


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
            (tree,) = direct_jobs.call(model, [Inputs(flux2_models.inputs(*given[:3], CONFIG, given[3]))])
            results |= {f"{case}/{attempt}/{row}": tensor for row, tensor in enumerate(tree[0])}
        for case in SAMPLES:
            conditioning, noise = sample(case)
            latents = direct_jobs.generate_from(
                model,
                conditioning,
                noise,
                height=noise.shape[2] * 16,
                width=noise.shape[3] * 16,
                steps=STEPS,
                guidance_scale=SAMPLES[case][4],
                options={"kv_cache": 1.0} if SAMPLES[case][6] else {},
            )
            results |= {f"{case}/{attempt}/{row}": tensor for row, tensor in enumerate(latents)}
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"rank{rank}.safetensors")
    xfuser_start.stop()


def main(out: Path, *layouts: str) -> None:
    from forked_ranks import fork_ranks

    from xditd.ipc.degrees import Degrees, parse_layout

    state = flux2_models.state_dict(SEED, CONFIG)
    for layout in layouts:
        folder = out / layout
        folder.mkdir()
        fork_ranks(run_rank, Degrees(**parse_layout(layout)).world_size, layout, state, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
