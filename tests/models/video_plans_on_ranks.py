"""A program, not a test: ranks on the CPU run calls of classes of videos and audio by their token plans.

python video_plans_on_ranks.py FOLDER RANKS

It writes ``ranks<N>.json``: for each call, the largest error relative to the largest value of the class's own forward,
and whether a second run gave the same bits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from class_entry import Random
from video_calls import VIDEO_CALLS

from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.plans import plans


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, tuple):
        for each in value:
            yield from tensors_of(each)


@torch.no_grad()
def run_call(name: str, ranks: Ranks) -> tuple[float, bool]:
    entry = VIDEO_CALLS[name].entry
    model = entry.build()

    def call() -> Any:
        return model(**entry.arguments(Random(1)))

    expected = list(tensors_of(call()))
    planned = PlannedModule(model, plans()[entry.name])
    found, again = (list(tensors_of(planned.run(call, ranks))) for _ in range(2))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    return error, all(map(torch.equal, found, again))


def run_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{ranks}", ranks), rank=rank, world_size=ranks)
    found = {name: run_call(name, Ranks(None, rank, ranks)) for name in VIDEO_CALLS}
    if rank == 0:
        Path(folder, f"ranks{ranks}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        run_rank, (int(sys.argv[2]), sys.argv[1]), nprocs=int(sys.argv[2]), start_method="fork"
    )
