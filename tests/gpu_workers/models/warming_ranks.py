"""A program, not a test: two gloo ranks ask whether a model is warmed up, which had weights on one of them.

    python warming_ranks.py FOLDER

GPUs are stood for by the memory that they say is free.
"""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from forked_ranks import fork_ranks

RANKS = 2
LIMIT_S = 30
"""A rank that another one left alone would wait for ever."""


def run_rank(rank: int, folder: str) -> None:
    from xditd.gpu_workers.models.model_warm_up import ROOM_BYTES, is_due
    from xditd.gpu_workers.parallel import rank_sync

    signal.alarm(LIMIT_S)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    rank_sync.share_page(store, "flags", rank, RANKS)
    free: dict[str, int] = {}
    torch.cuda.mem_get_info = lambda device: (free["bytes"], free["bytes"])
    found = []
    # Whether the model of each rank has had weights, and there is room. One may be new, because its GPU was full.
    for had_weights, has_room in (
        ((False, True), (True, True)),
        ((True, False), (True, True)),
        ((False, False), (True, False)),
        ((True, True), (True, True)),
        ((False, False), (True, True)),
    ):
        free["bytes"] = ROOM_BYTES - (not has_room[rank])
        model = SimpleNamespace(warm_up_sizes={"rows": 1}, had_weights=had_weights[rank], device=None)
        match: Any = SimpleNamespace(needs_conversion=False, model=model)
        due = is_due(match, (), is_lent=False)
        in_step = rank_sync.share_value(len(found)) == [len(found)] * RANKS
        found.append(due if in_step else "out of step")
    print(f"rank {rank}: {found}\n", end="", flush=True)  # one write: ranks share the pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_ranks(run_rank, RANKS, sys.argv[1])
