"""Time sharing a checkpoint with another process through torch's multiprocessing, one CUDA IPC handle for each tensor.

    python benchmarks/run.py tensor_ipc

One process makes the weights and sends them through a pipe (``reduce_tensor``); another opens all of them and assigns
them to diffusers' module. The time is from before the first tensor is sent until the module has all of them. Prefer
the daemon: torch refuses this with ``cudaMallocAsync``, and a receiver that is killed leaks a block.

Needs: a GPU; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import flux
import torch
from measuring import Report, add_device, need_gpus, print_table, synchronize

DEADLINE_S = 120.0


def receive(connection: Any, given: argparse.Namespace) -> None:
    """Build the module once; for each checkpoint, send the times when it was opened and assigned."""
    from diffusers import FluxTransformer2DModel

    from xditd.gpu_workers.families.flux1 import reference

    device = flux.device_of(given)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()
    module: Any = None
    connection.send(None)
    for _ in range(given.repeats + 1):
        tensors = connection.recv()
        opened = time.perf_counter()
        # The module is built only for the first checkpoint, as the workers keep built models.
        converted = reference.convert_transformer(tensors)
        if module is None:
            config = reference.transformer_from(tensors).config
            with torch.device("meta"):
                module = FluxTransformer2DModel.from_config(config)
        module.load_state_dict(converted, assign=True)
        synchronize(device)
        connection.send((opened, time.perf_counter()))
        module.to_empty(device="meta")
        del tensors, converted
        gc.collect()
        connection.send(None)  # all handles are closed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--repeats", type=int, default=5)


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("tensor_ipc", 1, given.device)
    spawn = torch.multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    receiver = spawn.Process(target=receive, args=(there, given), daemon=True)
    receiver.start()
    there.close()
    device = flux.device_of(given)
    tensors = flux.state_dict(flux.scale_of(given).size, flux.dtype_on(given.device), device, 0)
    answer(here)
    opens, wholes = [], []
    for _ in range(given.repeats + 1):
        synchronize(device)
        started = time.perf_counter()  # CLOCK_MONOTONIC: the same in both processes
        here.send(tensors)
        opened, assigned = answer(here)
        opens.append((opened - started) * 1e3)
        wholes.append((assigned - started) * 1e3)
        answer(here)
    report.add(tensors=len(tensors), first_ms=wholes[0], open_ms=opens[1:], whole_ms=wholes[1:])
    rows = (("open", opens), ("open and assign", wholes))
    print_table("Medians", [(name, f"{statistics.median(took[1:]):.1f} ms") for name, took in rows])
    receiver.join(DEADLINE_S)


def answer(connection: Any) -> Any:
    """Receive the other process's next message.

    Raises:
        SystemExit: it ended, or sends nothing.
    """
    try:
        if connection.poll(DEADLINE_S):
            return connection.recv()
    except EOFError:
        raise SystemExit("the receiving process ended") from None
    raise SystemExit(f"the receiving process did not answer within {DEADLINE_S:.0f} s")
