"""The leader of a worker group: starts the ranks, and ends them all when one of them ends."""

from __future__ import annotations

import logging
import os
import signal
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import cast

import torch
import torch.multiprocessing

from xditd.gpu_workers import rank
from xditd.gpu_workers.options import Options
from xditd.gpu_workers.parents import die_with_parent
from xditd.ipc import planner
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.planner import Plan

logger = logging.getLogger(__name__)

CPU_WORKERS = 2


def lead(options: Options) -> int:
    """Run the group until it ends; return the exit status.

    Raises:
        RequestError: the configuration cannot work, on this machine or at all; a restart would not help.
    """
    die_with_parent(os.getppid())
    devices = choose_devices(options)
    plan = planner.plan(len(devices), options.layout)
    logger.info("layout planned workers=%d layout=%s reason=%s", len(devices), plan.degrees, plan.reason)
    signal.signal(signal.SIGTERM, _leave)
    return _run(options, plan, devices)


def _leave(*_: object) -> None:
    """Unwind through ``_run``, which kills the ranks before the leader exits."""
    raise SystemExit(0)


def choose_devices(options: Options) -> list[str]:
    """Decide which device each rank gets.

    Raises:
        BadRequest: more workers than GPUs.
        Unsupported: CUDA was asked for and there is none.
    """
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and not gpus:
        raise Unsupported(f"device cuda: torch {torch.__version__} sees no CUDA GPU; use --device cpu or auto")
    if options.device == "cpu" or not gpus:
        return ["cpu"] * (options.workers or CPU_WORKERS)
    workers = options.workers or gpus
    if workers > gpus:
        raise BadRequest(f"{workers} workers with {gpus} GPUs: one worker needs one GPU; use --workers {gpus} or auto")
    return [f"cuda:{index}" for index in range(workers)]


def _run(options: Options, plan: Plan, devices: list[str]) -> int:
    spawn = torch.multiprocessing.get_context("spawn")
    ranks: list[SpawnProcess] = []
    complaints: list[Connection] = []
    # Where the ranks find each other: memory of this process. A file in a folder could be removed before they have met,
    # and NCCL comes back to it whenever a job needs a communicator for the first time.
    store = os.memfd_create("xditd-store", os.MFD_CLOEXEC)
    store_path = f"/proc/{os.getpid()}/fd/{store}"
    try:
        for number, device in enumerate(devices):
            complaint, complain = spawn.Pipe(duplex=False)
            process = spawn.Process(
                target=rank.main,
                args=(options, number, plan, device, complain, os.getpid(), store_path),
                daemon=True,
            )
            process.start()
            complain.close()
            ranks.append(process)
            complaints.append(complaint)
        return _watch(ranks, complaints)
    finally:
        for process in ranks:
            process.kill()  # SIGKILL: a rank may be stopped, or stuck in a collective
        for process in ranks:
            process.join()
        os.close(store)


def _watch(ranks: list[SpawnProcess], complaints: list[Connection]) -> int:
    """Wait for the first rank to fail, or for all to leave in peace."""
    alive = {process.sentinel: (number, process) for number, process in enumerate(ranks)}
    while alive:
        for sentinel in wait(list(alive)):
            number, process = alive.pop(cast(int, sentinel))
            process.join()
            if process.exitcode == 0:
                continue
            if complaints[number].poll():
                try:
                    detail = complaints[number].recv_bytes(maxlength=65_536).decode()
                except EOFError:
                    detail = ""
                if detail:
                    raise BadRequest(detail)
            logger.error("rank ended rank=%d exit=%s; ending the group", number, process.exitcode)
            return 1
    return 0
