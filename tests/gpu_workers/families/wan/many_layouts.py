"""A program, not a test: call Wan in layouts on gloo ranks, and write what each rank got.

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

import wan_models  # noqa: E402 - from one of these folders

SEED = 0
ROUNDS = 2
CONFIGS = {
    "image": replace(wan_models.CLIP_IMAGE, hidden=768),
    "two images": replace(wan_models.TWO_IMAGES, hidden=768, blocks=1),
    "control": replace(wan_models.TWO_CONTROLS, hidden=768, blocks=2),
}
"""Six heads: Ulysses may have degrees 2 and 3."""

LAYOUTS = ("ulysses=2", "cfg=2", "ring=3", "cfg=2,ulysses=2")

# name: model, rows, size of the latents, whether each token has a time
CALLS: dict[str, tuple[str, int, tuple[int, int, int], bool]] = {
    "all divide": ("image", 1, (2, 4, 8), False),
    "odd frames and sides": ("image", 1, (3, 6, 10), False),
    "batch of two": ("image", 2, (1, 6, 14), False),
    "batch of three, a time for each token": ("image", 3, (3, 6, 10), True),
    "two images, batch of two": ("two images", 2, (1, 6, 10), False),
    "control, batch of three": ("control", 3, (3, 6, 10), False),
    "two controls, batch of two": ("control", 2, (3, 6, 10), False),
}


def inputs(case: str) -> dict[str, Any]:
    model, rows, size, is_per_token = CALLS[case]
    if case.startswith("two controls"):
        return wan_models.controlled_inputs(rows, 512, size, 2, CONFIGS[model])
    return wan_models.inputs(rows, 512, size, CONFIGS[model], is_per_token=is_per_token)


def run_rank(rank: int, layout: str, folder: Path) -> None:
    import direct_jobs
    from safetensors.torch import save_file

    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.models.operations import Inputs
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees, parse_layout

    torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, degrees.world_size, str(folder / "store"), torch.device("cpu"), degrees)
    cache = ModelCache(started)
    models = {name: direct_jobs.plugged(cache, wan_models.state_dict(SEED, config)) for name, config in CONFIGS.items()}
    results: dict[str, torch.Tensor] = {}
    for attempt in range(ROUNDS):
        for case in CALLS:
            ((tree,),) = direct_jobs.call(models[CALLS[case][0]], [Inputs(inputs(case))])
            results |= {f"{case}/{attempt}/{row}": tensor for row, tensor in enumerate(tree)}
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"rank{rank}.safetensors")
    xfuser_start.stop()


def main(out: Path, *layouts: str) -> None:
    from forked_ranks import fork_ranks

    from xditd.ipc.degrees import Degrees, parse_layout

    for layout in layouts:
        folder = out / layout
        folder.mkdir()
        fork_ranks(run_rank, Degrees(**parse_layout(layout)).world_size, layout, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
