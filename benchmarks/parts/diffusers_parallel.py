"""Time diffusers' own sequence parallelism (``enable_parallelism``, Ulysses) on several GPUs, without xditd.

    python benchmarks/run.py diffusers_parallel --workers 2
    python benchmarks/run.py diffusers_parallel --models wan flux2 --workers 2 4 --json FILE
    python benchmarks/run.py diffusers_parallel --device cpu --small --workers 2

The models and arguments are those of the part ``modules``, which times the same calls through ``accelerate``. Weights
are random, made on each GPU. Prints the median of one forward in ms; a model without a plan in diffusers has none.

Needs: as many GPUs as --workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import Report, add_device, add_ranks, need_gpus, print_table, synchronize
from parts.modules import MODELS, Subjects, build

WARM_UP = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--calls", type=int, default=9, help="timed calls of each; 3 of wan")
    add_ranks(parser)
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> int:
    for ranks in given.ranks:
        need_gpus("diffusers_parallel", ranks, given.device)
        found = {}
        for name in given.models:
            with tempfile.TemporaryDirectory(prefix="xditd-diffusers-") as folder:
                torch.multiprocessing.spawn(time_rank, (ranks, folder, name, vars(given)), nprocs=ranks)
                found[name] = json.loads(Path(folder, "found.json").read_text())
            report.add(**{f"{name}, {ranks} GPUs": found[name]})
        rows = [(name, str(each.get("median_ms", "-")), each.get("fault", "")) for name, each in found.items()]
        print_table(f"diffusers on {ranks} GPUs", [("model", "ms", ""), *rows])
    return 0


def time_rank(rank: int, ranks: int, folder: str, name: str, given: dict[str, Any]) -> None:
    """Time one model in one of the processes; the first one writes what it has found."""
    is_cuda = given["device"] == "cuda"
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", store=store, rank=rank, world_size=ranks)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    class_name, config, make = getattr(Subjects(device, dtype, small=given["small"]), name)()
    model: Any = build(class_name, config, device, dtype)
    found: dict[str, Any] = {"class": class_name}
    try:
        found["median_ms"] = round(statistics.median(_times_ms(model, make, ranks, given, name)), 1)
    # No plan, counts that do not divide; without GPUs diffusers divides by their number.
    except (ValueError, NotImplementedError, RuntimeError, ZeroDivisionError) as error:
        found["fault"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@torch.no_grad()
def _times_ms(model: Any, make: Any, ranks: int, given: dict[str, Any], name: str) -> list[float]:
    from diffusers import ContextParallelConfig

    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    torch.manual_seed(0)
    arguments = make()  # the same on every rank
    times_ms = []
    for _ in range(WARM_UP + (min(given["calls"], 3) if name == "wan" else given["calls"])):
        synchronize(_device_of(arguments))
        dist.barrier()
        began = time.perf_counter()
        model(**arguments)
        synchronize(_device_of(arguments))
        times_ms.append((time.perf_counter() - began) * 1e3)
    return times_ms[WARM_UP:]


def _device_of(arguments: dict[str, Any]) -> torch.device:
    """Return the device of the first tensor among the arguments."""
    first = next(iter(arguments.values()))
    return (first[0] if isinstance(first, list) else first).device
