"""A program, not a test: one of two gloo ranks ends while the other waits; that one prints whether it recognised it.

python lost_rank.py FOLDER
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    flag = torch.ones(1)
    dist.all_reduce(flag)
    if rank == 1:
        os._exit(0)
    from xditd.gpu_workers.parallel.rank_errors import is_peer_rank_failure

    try:
        dist.all_reduce(flag)
    except RuntimeError as error:
        print(is_peer_rank_failure(error), error, flush=True)
    os._exit(0)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, (sys.argv[1],), nprocs=2, start_method="fork")
