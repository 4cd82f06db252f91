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
CONFIG = replace(wan_models.CLIP_IMAGE, hidden=768)
"""Six heads: Ulysses may have degrees 2 and 3."""

LAYOUTS = ("ulysses=2", "cfg=2", "ring=3", "cfg=2,ulysses=2")

# name: rows, size of the latents, whether each token has a time
CALLS: dict[str, tuple[int, tuple[int, int, int], bool]] = {
    "all divide": (1, (2, 4, 8), False),
    "odd frames and sides": (1, (3, 6, 10), False),
    "batch of two": (2, (1, 6, 14), False),
    "batch of three, a time for each token": (3, (3, 6, 10), True),
}


def inputs(case: str) -> dict[str, Any]:
    rows, size, is_per_token = CALLS[case]
    return wan_models.inputs(rows, 512, size, CONFIG, is_per_token=is_per_token)


def run_rank(rank: int, layout: str, state: dict[str, torch.Tensor], folder: Path) -> None:
    import direct_jobs
    from safetensors.torch import save_file

    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.models.operations import Inputs
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees, parse_layout

    torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, degrees.world_size, str(folder / "store"), torch.device("cpu"), degrees)
    model = direct_jobs.plugged(ModelCache(started), state)
    results: dict[str, torch.Tensor] = {}
    for attempt in range(ROUNDS):
        for case in CALLS:
            ((tree,),) = direct_jobs.call(model, [Inputs(inputs(case))])
            results |= {f"{case}/{attempt}/{row}": tensor for row, tensor in enumerate(tree)}
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"rank{rank}.safetensors")
    xfuser_start.stop()


def main(out: Path, *layouts: str) -> None:
    from forked_ranks import fork_ranks

    from xditd.ipc.degrees import Degrees, parse_layout

    state = wan_models.state_dict(SEED, CONFIG)
    for layout in layouts:
        folder = out / layout
        folder.mkdir()
        fork_ranks(run_rank, Degrees(**parse_layout(layout)).world_size, layout, state, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
