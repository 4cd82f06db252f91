"""A program, not a test: four gloo ranks agree, all and in pairs, each late in turn, and print the faults.

python meeting_ranks.py FOLDER
"""

from __future__ import annotations

import os
import random
import sys
import time

import torch
import torch.distributed as dist

RANKS = 4
PAIR = 2
ROUNDS = 200


def run_rank(rank: int, folder: str) -> None:
    from xditd.gpu_workers.parallel import rank_sync

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    descriptors = len(os.listdir("/proc/self/fd"))
    rank_sync.share_page(store, "flags", rank, RANKS)
    pair = rank // PAIR
    rank_sync.share_page(store, f"flags{pair}", rank % PAIR, PAIR, rank_sync.RankSet.SEQUENCE)
    wrong = []
    lateness = random.Random(rank)
    for number in range(ROUNDS):
        if lateness.random() < 0.1:
            time.sleep(lateness.random() * 5e-3)
        draw = random.Random(number)  # the same on every rank
        said = [draw.random() < 0.7 for _ in range(RANKS)]
        if rank_sync.agree(said[rank]) != all(said):
            wrong.append(f"round {number}: agree")
        # Between exchanges of all ranks, the second pair exchanges twice as often as the first.
        for _ in range(1 + pair):
            if rank_sync.agree(said[rank], rank_sync.RankSet.SEQUENCE) != all(said[pair * PAIR : (pair + 1) * PAIR]):
                wrong.append(f"round {number}: agree in pairs")
        if rank_sync.broadcast_stop(said[rank]) != said[0]:
            wrong.append(f"round {number}: broadcast_stop")
    # A mapping keeps a descriptor of its own, two for two pages.
    if len(os.listdir("/proc/self/fd")) != descriptors + 2:
        wrong.append("a descriptor is left behind")
    print(f"rank {rank}: {wrong or 'agreed'}\n", end="", flush=True)  # one write: ranks share the pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, (sys.argv[1],), nprocs=RANKS, start_method="fork")
