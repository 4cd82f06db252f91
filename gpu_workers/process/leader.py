"""The leader of a worker group: starts the ranks, and ends them all when one of them ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import cast

import torch
import torch.multiprocessing

from xditd.gpu_workers.process import rank, start_faults
from xditd.gpu_workers.process.die_with_parent import die_with_parent
from xditd.gpu_workers.process.options import Options
from xditd.ipc import layout_choice
from xditd.ipc.errors import BadRequest, Unsupported, WorkersLost, XditdError
from xditd.ipc.layout_choice import LayoutChoice
from xditd.ipc.processes import describe_exit
from xditd.ipc.worker_messages import CONFIGURATION_STATUS, UNEXPLAINED, VERDICT_PREFIX

logger = logging.getLogger(__name__)

CPU_WORKERS = 2


def lead(options: Options) -> int:
    """Run the group until it ends; return the exit status.

    Raises:
        RequestError: the configuration cannot work, on this machine or at all; a restart would not help.
        WorkersLost: a rank has ended by a fault.
    """
    die_with_parent(os.getppid())
    devices = choose_devices(options)
    choice = layout_choice.choose_layout(len(devices), options.degrees)
    logger.info("layout planned workers=%d layout=%s reason=%s", len(devices), choice.degrees, choice.reason)
    signal.signal(signal.SIGTERM, _leave)
    return _run(options, choice, devices)


def _leave(number: int, _: object) -> None:
    """Unwind through ``_run``, which kills the ranks before the leader exits."""
    raise Terminated(number)


class Terminated(BaseException):
    """A signal asks the leader to end the group; of no ``except Exception``'s business."""


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
        return ["cpu"] * (CPU_WORKERS if options.workers == "auto" else options.workers)
    workers = gpus if options.workers == "auto" else options.workers
    if workers > gpus:
        raise BadRequest(f"{workers} workers with {gpus} GPUs: one worker needs one GPU; use --workers {gpus} or auto")
    return [f"cuda:{index}" for index in range(workers)]


def _run(options: Options, choice: LayoutChoice, devices: list[str]) -> int:
    spawn = torch.multiprocessing.get_context("spawn")
    ranks: list[SpawnProcess] = []
    error_pipes: list[Connection] = []
    # Where the ranks find each other: memory of this process. A file in a folder could be removed before they have met,
    # and NCCL comes back to it whenever a job needs a communicator for the first time.
    store = os.memfd_create("xditd-store", os.MFD_CLOEXEC)
    store_path = f"/proc/{os.getpid()}/fd/{store}"
    try:
        for number, device in enumerate(devices):
            reader, error_pipe = spawn.Pipe(duplex=False)
            process = spawn.Process(
                target=rank.main,
                args=(options, number, choice, device, error_pipe, os.getpid(), store_path),
                daemon=True,
            )
            process.start()
            error_pipe.close()
            ranks.append(process)
            error_pipes.append(reader)
        _watch(ranks, error_pipes)
    except Terminated as ending:
        # The daemon often hears first of a lost rank from those who waited for it, and ends the group: only here is
        # known which one it was. Where the daemon just wants the group to end, nobody reads this.
        lost = _first_loss(ranks, error_pipes)
        number = int(ending.args[0])
        why = lost.detail if lost else f"{signal.Signals(number).name} told the leader to end the group"
        print(f"{VERDICT_PREFIX}{why}", file=sys.stderr, flush=True)
        return 1 if lost else 128 + number  # as a shell reports a program that a signal ended
    finally:
        for process in ranks:
            process.kill()  # SIGKILL: a rank may be stopped, or stuck in a collective
        for process in ranks:
            process.join()
        os.close(store)
    return 0


def _watch(ranks: list[SpawnProcess], error_pipes: list[Connection]) -> None:
    """Wait for all ranks to leave in peace.

    Raises:
        BadRequest: a rank has said why it cannot start, and no restart helps.
        WorkersLost: a rank has ended otherwise.
    """
    alive = {process.sentinel: process for process in ranks}
    while alive:
        for sentinel in wait(list(alive)):
            alive.pop(cast(int, sentinel)).join()
        lost = _first_loss(ranks, error_pipes)
        if lost is not None:
            raise lost


def _first_loss(ranks: list[SpawnProcess], error_pipes: list[Connection]) -> XditdError | None:
    """Say of the first rank that has ended on its own, by a fault, what ended it: a cause before its consequences."""
    found: list[tuple[bool, XditdError]] = []
    for number, process in enumerate(ranks):
        if not process.exitcode:
            continue
        said = _reason_in(error_pipes[number])
        if process.exitcode == CONFIGURATION_STATUS and said:
            return BadRequest(said)
        how = f"rank {number} {describe_exit(process.exitcode)}"
        is_killed = process.exitcode < 0
        why = f"{how}: {said}" if said else how if is_killed else f"{how} {UNEXPLAINED}"
        found.append((not is_killed, WorkersLost(why)))
    # A rank that was killed makes the others fail, and never the other way round.
    return min(found, key=lambda each: each[0])[1] if found else None


def _reason_in(pipe: Connection) -> str:
    with contextlib.suppress(EOFError, OSError):
        if pipe.poll():
            return pipe.recv_bytes(maxlength=start_faults.MAX_DETAIL_BYTES).decode()
    return ""
