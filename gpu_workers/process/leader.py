"""The leader of a worker group: starts the ranks, and ends them all when one of them ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import torch
import torch.multiprocessing

from xditd.gpu_workers.process import preload, rank, start_faults
from xditd.gpu_workers.process.die_with_parent import OUTPUT, has_no_reader
from xditd.gpu_workers.process.options import Options
from xditd.ipc import host_limits, layout_choice
from xditd.ipc.errors import BadRequest, Unsupported, WorkersLost, XditdError
from xditd.ipc.layout_choice import LayoutChoice
from xditd.ipc.processes import describe_exit
from xditd.ipc.worker_messages import CONFIGURATION_STATUS, UNEXPLAINED, VERDICT_PREFIX

logger = logging.getLogger(__name__)

CPU_WORKERS = 2


def lead(options: Options, gpus: int, attempts: Sequence[str]) -> int:
    """Run the group until it ends, where torch sees ``gpus`` GPUs; return the exit status.

    ``attempts`` are the connections to other hosts that this process has tried so far; the ranks count them, too.

    Raises:
        RequestError: the configuration cannot work here; a restart would not help.
        WorkersLost: a rank has failed.
    """
    devices = choose_devices(options, gpus)
    hidden = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if options.device == "auto" and not gpus and hidden:
        logger.warning(
            "torch sees none of this machine's %d GPUs, so the CPU is used; see CUDA_VISIBLE_DEVICES, and xditd doctor",
            len(hidden),
        )
    choice = layout_choice.choose_layout(len(devices), options.degrees)
    logger.info("layout chosen workers=%d layout=%s reason=%s", len(devices), choice.degrees, choice.reason)
    why_not = "an import has opened CUDA" if preload.has_opened_gpu() else preload.find_threads()
    if why_not:
        logger.warning("%s: ranks are spawned, and import everything again", why_not)
    return _run(options, choice, devices, "spawn" if why_not else "fork", attempts)


def choose_devices(options: Options, gpus: int) -> list[str]:
    """Choose the device of each rank, where torch sees ``gpus`` GPUs.

    Raises:
        BadRequest: more workers than GPUs.
        Unsupported: CUDA was asked for and there is none.
    """
    if options.device == "cuda" and not gpus:
        raise Unsupported(f"device cuda: torch {torch.__version__} sees no CUDA GPU; use --device cpu or auto")
    if options.device == "cpu" or not gpus:
        return ["cpu"] * (CPU_WORKERS if options.workers == "auto" else options.workers)
    workers = gpus if options.workers == "auto" else options.workers
    if workers > gpus:
        raise BadRequest(f"{workers} workers with {gpus} GPUs: one worker needs one GPU; use --workers {gpus} or auto")
    return [f"cuda:{index}" for index in range(workers)]


def _run(options: Options, choice: LayoutChoice, devices: list[str], method: str, attempts: Sequence[str]) -> int:
    sigterm = _watch_sigterm()
    context = torch.multiprocessing.get_context(method)
    assert isinstance(context, (ForkContext, SpawnContext))
    ranks: list[BaseProcess] = []
    error_pipes: list[Connection] = []
    # The file of torch's FileStore, in this process's memory: a file in a folder could be removed while it is needed,
    # and NCCL reads it whenever it makes another communicator.
    kills_before = host_limits.count_memory_kills()
    store = os.memfd_create("xditd-store", os.MFD_CLOEXEC)
    store_path = f"/proc/{os.getpid()}/fd/{store}"
    try:
        for number, device in enumerate(devices):
            reader, error_pipe = context.Pipe(duplex=False)
            started = context.Process(
                target=rank.main,
                args=(options, number, choice, device, error_pipe, os.getpid(), store_path, attempts),
                daemon=True,
            )
            started.start()
            error_pipe.close()
            ranks.append(started)
            error_pipes.append(reader)
        is_terminated = _wait_for_ranks(ranks, error_pipes, sigterm, kills_before)
    finally:
        for process in ranks:
            process.kill()  # SIGKILL: a rank may be stopped, or stuck in a collective
        for process in ranks:
            process.join()
        os.close(store)
    if is_terminated:
        print(f"{VERDICT_PREFIX}SIGTERM told the leader to end the group", file=sys.stderr, flush=True)
        return 128 + signal.SIGTERM  # the status by which a shell reports a signal
    return 0


def _watch_sigterm() -> int:
    """Return a descriptor that is readable after SIGTERM.

    A handler that raises would lose the error of a rank if the signal came while the leader ends the others.
    """
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.write(writable, b"."))
    return readable


def _wait_for_ranks(ranks: list[BaseProcess], error_pipes: list[Connection], sigterm: int, kills_before: int) -> bool:
    """Wait until all ranks have exited with status 0, or SIGTERM has come; return whether it has.

    Raises:
        BadRequest: a rank cannot start, and a restart would not help.
        WorkersLost: a rank has failed otherwise, or the daemon has ended.
    """
    alive = {process.sentinel: process for process in ranks}
    while alive:
        # A pipe is ready here once it has no reader. The kernel ends this process with its parent, but that is a
        # program in between where the workers' command is one that stays (unshare --fork, a container).
        ready = cast(list[int], wait([*alive, sigterm, *_output_pipe()]))
        for sentinel in ready:
            if sentinel in alive:
                alive.pop(sentinel).join()
        # Before SIGTERM is obeyed: when a rank dies, the ranks that wait for it often report first, and the daemon
        # then ends the group, but only the leader knows which rank died.
        lost = _find_failure(ranks, error_pipes, kills_before)
        if lost is not None:
            raise lost
        if sigterm in ready:
            return True
        if has_no_reader(OUTPUT):
            raise WorkersLost("the daemon has ended")
    return False


def _output_pipe() -> list[int]:
    return [OUTPUT] if stat.S_ISFIFO(os.fstat(OUTPUT).st_mode) else []


def _find_failure(ranks: list[BaseProcess], error_pipes: list[Connection], kills_before: int) -> XditdError | None:
    """Return the error of the rank that failed first, or ``None``.

    ``kills_before`` is how many processes the kernel had ended for want of memory when the group started.
    """
    found: list[tuple[bool, XditdError]] = []
    for number, process in enumerate(ranks):
        if not process.exitcode:
            continue
        said = _read_reason(error_pipes[number])
        if process.exitcode == CONFIGURATION_STATUS and said:
            return BadRequest(said)
        how = f"rank {number} {describe_exit(process.exitcode)}"
        is_killed = process.exitcode < 0
        if process.exitcode == -signal.SIGKILL:
            said = host_limits.explain_kill(kills_before)
        why = f"{how}: {said}" if said else how if is_killed else f"{how} {UNEXPLAINED}"
        found.append((not is_killed, WorkersLost(why)))
    # A rank that a signal killed makes the others fail, never the reverse.
    return min(found, key=lambda each: each[0])[1] if found else None


def _read_reason(pipe: Connection) -> str:
    with contextlib.suppress(EOFError, OSError):
        if pipe.poll():
            return pipe.recv_bytes(maxlength=start_faults.MAX_DETAIL_BYTES).decode()
    return ""
