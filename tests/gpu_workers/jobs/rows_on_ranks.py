"""A program, not a test: ranks run calls of modules by rows, and compare them with the modules themselves.

python rows_on_ranks.py FOLDER RANKS DEVICE, where DEVICE is cpu or cuda
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback

import row_scenarios as rows
import token_scenarios as tokens
import torch
import torch.distributed as dist
from counted_ranks import Ranks

LIMIT_S = 50.0
"""For one scenario."""


def run_rank(rank: int, folder: str, ranks: int, device_type: str) -> None:
    from xditd.gpu_workers.parallel import rank_sync

    store = dist.FileStore(f"{folder}/store", ranks)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    rank_sync.share_page(store, "flags", rank, ranks)
    for scenario in (
        rows.parts_and_rows,
        rows.all_kinds_of_results,
        rows.what_cannot_be_split,
        rows.a_table_that_is_made_once,
        rows.a_later_call_that_does_not_fit,
        rows.errors_on_one_rank,
        rows.refused_rows_that_are_right_together,
        tokens.tokens_of_every_row,
        tokens.tokens_that_the_plan_cannot_split,
        tokens.faults_of_one_rank,
        tokens.ways_that_ranks_choose_together,
        rows.rows_without_room_when_they_are_checked,
        rows.roundings_that_a_model_makes_much_of,
        tokens.forwards_that_are_captured,
        tokens.forwards_with_loras_that_are_captured,
    ):
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # where a rank waits for another one
        try:
            on = Ranks(rank, ranks, device)
            with torch.no_grad(), device:
                scenario(on)
            on.close()
        except Exception:  # noqa: BLE001 - at once: communicators that are closed wait for the other ranks
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        print(f"rank {rank}: {scenario.__name__}\n", end="", flush=True)  # one write: ranks share the pipe
    dist.destroy_process_group()


def main(folder: str, ranks: int, device: str) -> None:
    method = "fork" if device == "cpu" else "spawn"  # forked ranks need not import torch again
    torch.multiprocessing.start_processes(run_rank, (folder, ranks, device), nprocs=ranks, start_method=method)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
