"""Show what workers hold on their GPUs after jobs, by part, and what a job costs after an idle time that freed memory.

    python benchmarks/run.py memory --workers 2 --json FILE
    python benchmarks/run.py memory --device cpu --small --workers 2

A FLUX.1 transformer with its VAE on the first GPU is lent, and jobs run. Memory is counted a second after the last of
them, and again after the idle time in which workers give back what torch keeps. Then one more job runs: its time is
compared with that of jobs that follow one another.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import flux
import torch
from machine import gpu_memory_by_process
from measuring import GIB, Report, add_device, need_gpus, print_table, say

from xditd.client import Client, Loan
from xditd.client.arenas import Arena
from xditd.client.demo import checkpoints
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.gpu_workers.process.idle_memory import COUNT_AFTER_S, TRIM_AFTER_S
from xditd.ipc.status import WorkerStatus

BAR_GIB: Final = 3.0
"""Of memory beyond weights on each GPU, once the workers are idle."""
LATE_S: Final = 1.5
"""How long after a count is due it has arrived."""
IMPORTS_S: Final = 30.0
"""How long new workers may still import."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=5, help="one after the other, before memory is counted")
    parser.add_argument("--idles", type=int, default=2, help="idle times, each with a job after it")
    parser.add_argument("--steps", type=int, default=4, help="of each job")
    parser.add_argument("--flags", action="append", default=[], help="a flag of the daemon, --flags=--name=value")


def run(given: argparse.Namespace, report: Report) -> int:
    need_gpus("memory", given.workers, given.device)
    with tempfile.TemporaryDirectory(prefix="xditd-memory-") as folder:
        daemon = DaemonProcess(Path(folder, "daemon.log"), given.workers, given.device, given.flags)
        try:
            client = daemon.connect()
            with _Lent(daemon, client, given) as lent:
                found = _measure(client, lent, given)
            client.close()
        finally:
            daemon.stop(None)
    report.add(workers=given.workers, jobs=given.jobs, **found)
    return show(found)


class _Lent:
    """Lends random weights of a transformer and a VAE, which this process frees after the daemon has unmapped them."""

    def __init__(self, daemon: DaemonProcess, client: Client, given: argparse.Namespace) -> None:
        scale, dtype, device = flux.scale_of(given), flux.dtype_on(given.device), str(flux.device_of(given))
        self._arena = Arena(flux.shapes(scale.size, dtype), device)
        flux.fill(self._arena.tensors, 0)
        vae = checkpoints.flux_vae_state_dict(0, channels=scale.vae_channels, encoder=False, dtype=dtype)
        daemon.wait_ready(client, lambda _: None)
        self.transformer = client.lend(self._arena.tensors)
        self.vae = client.lend({name: tensor.to(device) for name, tensor in vae.items()})
        self.weights_bytes = self._arena.size_bytes + sum(tensor.nbytes for tensor in vae.values())

    def __enter__(self) -> _Lent:
        return self

    def __exit__(self, *_: object) -> None:
        for loan in (self.transformer, self.vae):
            loan.return_()
        self._arena.close()


def _measure(client: Client, lent: _Lent, given: argparse.Namespace) -> dict[str, Any]:
    scale = flux.scale_of(given)
    inputs = {
        "prompt_embeds": torch.zeros(1, scale.tokens, 4096, dtype=flux.dtype_on(given.device)),
        "pooled_prompt_embeds": torch.zeros(1, 768, dtype=flux.dtype_on(given.device)),
    }

    def job(transformer: Loan = lent.transformer) -> float:
        began_s = time.perf_counter()
        client.generate(
            transformer, inputs, vae=lent.vae, height=scale.pixels, width=scale.pixels, steps=given.steps, seed=0
        ).result()
        return (time.perf_counter() - began_s) * 1e3

    say(f"  {given.jobs} jobs")
    jobs = [job() for _ in range(given.jobs)]
    time.sleep(COUNT_AFTER_S + LATE_S)
    after_jobs = counted(_once_counted(client))
    late = []
    for _ in range(given.idles):
        jobs += [job(), job()]  # as they follow one another
        say(f"  idle for {TRIM_AFTER_S:g} s")
        time.sleep(TRIM_AFTER_S + LATE_S)
        trimmed, held = counted(client.status().workers), gpu_memory_by_process()
        pids = [worker.pid for worker in client.status().workers]
        late.append(job())
    usual_ms = statistics.median(jobs[1:])
    return {
        "weights_gib": lent.weights_bytes / GIB,
        "after_jobs": after_jobs,
        "after_idle": trimmed,
        "driver_gib": [held[pid] / GIB for pid in pids if pid in held],
        "first_job_ms": jobs[0],
        "job_ms": usual_ms,
        "job_after_idle_ms": late,
        "job_after_idle_ratio": statistics.median(late) / usual_ms,
    }


def _once_counted(client: Client) -> Sequence[WorkerStatus]:
    """Return the workers once each has counted its memory. One that still imports between the jobs counts later."""
    give_up_s = time.monotonic() + IMPORTS_S
    while any(each.memory is None for each in client.status().workers) and time.monotonic() < give_up_s:
        time.sleep(0.2)
    return client.status().workers


def counted(workers: Sequence[WorkerStatus]) -> list[dict[str, float]]:
    """Return GiB by part of each worker, and the sum of all but the weights."""
    found = []
    for worker in workers:
        if worker.memory is None:
            raise SystemExit(f"rank {worker.rank} has not counted its memory, though it was idle")
        parts = {part: size / GIB for part, size in worker.memory.by_part.items()}
        found.append(parts | {"beyond weights": worker.memory.beyond_weights_bytes / GIB})
    return found


def show(found: dict[str, Any]) -> int:
    """Print the tables; return 1 if a worker holds more than the bar."""
    names = list(dict.fromkeys(name for each in found["after_jobs"] for name in each))
    ranks = range(len(found["after_jobs"]))
    header = ("GiB", *(f"rank {rank} {when}" for rank in ranks for when in ("after jobs", "idle")))
    rows = [
        (name, *(f"{found[when][rank].get(name, 0):.2f}" for rank in ranks for when in ("after_jobs", "after_idle")))
        for name in names
    ]
    print_table(f"memory of the workers; weights of {found['weights_gib']:.2f} GiB are lent", [header, *rows])
    if found["driver_gib"]:
        print_table(
            "all that the driver counts", [(f"rank {n}", f"{g:.2f}") for n, g in enumerate(found["driver_gib"])]
        )
    print_table(
        "jobs",
        [
            ("one after the other", f"{found['job_ms']:.0f} ms"),
            ("after an idle time", f"{statistics.median(found['job_after_idle_ms']):.0f} ms"),
            ("ratio", f"{found['job_after_idle_ratio']:.2f}"),
        ],
    )
    most = max(each["beyond weights"] for each in found["after_idle"])
    print_table(
        "bar", [("beyond weights, each GPU", f"{most:.2f} GiB", f"bar {BAR_GIB:g}", f"{most / BAR_GIB:.2f} of it")]
    )
    return int(most > BAR_GIB)
