"""Measure what a call through ``accelerate`` costs beside the forward itself: the part of client, daemon and workers.

    python benchmarks/run.py call_overhead                       # one and two CPU workers
    python benchmarks/run.py call_overhead --models qwen_image --calls 1000

The models are tiny, so that messages, checks and descriptions are most of a call. Prints, by model and number of
workers, medians of one call and of the same forward in this process (``call_ms``, ``here_ms``), the time that a slow
call takes (``p95_ms``), and the processor time of one call in this process, in the daemon and in the busiest worker
(``client_cpu_ms``, ``daemon_cpu_ms``, ``worker_cpu_ms``), which other programs change less. The forward itself is in
``worker_cpu_ms``.

Needs: nothing else
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import Report, add_ranks, print_table
from parts.modules import MODELS, Subjects, build, processor_s

from xditd.client import Client, accelerate
from xditd.client.demo.daemon_process import DaemonProcess

WARM_UPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["flux1", "qwen_image", "z_image"], choices=MODELS)
    parser.add_argument("--calls", type=int, default=300, help="timed calls of each model")
    add_ranks(parser)
    parser.set_defaults(ranks=[1, 2])


def run(given: argparse.Namespace, report: Report) -> int:
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = []
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory(prefix="xditd-calls-") as folder:
            daemon = DaemonProcess(Path(folder, "daemon.log"), ranks, "cpu")
            client = None
            try:
                client = daemon.connect()
                client.wait_ready(300.0)
                for name in given.models:
                    found = measure(name, given.calls, client, daemon.pid)
                    report.add(**{f"{name}, {ranks} workers": found})
                    rows.append((name, str(ranks), *(f"{each:.2f}" for each in found.values())))
            finally:
                daemon.stop(client)
    print_table("medians of one call", [("model", "workers", *found), *rows])
    return 0


@torch.no_grad()
def measure(name: str, calls: int, client: Client, daemon_pid: int) -> dict[str, Any]:
    """Time calls of a tiny model in the workers, and forwards of it here before them."""
    class_name, config, make = getattr(Subjects(torch.device("cpu"), torch.float32, small=True), name)()
    model = build(class_name, config, torch.device("cpu"), torch.float32)
    arguments = make()
    here_ms = time_calls(lambda: model(**arguments), calls // 3 + 1)
    workers = [worker.pid for worker in client.status().workers]
    with accelerate(model, client=client):
        for _ in range(WARM_UPS):
            model(**arguments)
        before_s = {pid: processor_s(pid) for pid in (os.getpid(), daemon_pid, *workers)}
        call_ms = time_calls(lambda: model(**arguments), calls)
        took_ms = {pid: (processor_s(pid) - began_s) / calls * 1e3 for pid, began_s in before_s.items()}
    return {
        "call_ms": statistics.median(call_ms),
        "here_ms": statistics.median(here_ms),
        "p95_ms": statistics.quantiles(call_ms, n=20)[-1],
        "client_cpu_ms": took_ms[os.getpid()],
        "daemon_cpu_ms": took_ms[daemon_pid],
        "worker_cpu_ms": max(took_ms[pid] for pid in workers),
    }


def time_calls(call: Any, calls: int) -> list[float]:
    took_ms = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        took_ms.append((time.perf_counter() - began) * 1e3)
    return took_ms
