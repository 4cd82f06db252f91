"""Measure one worker group from a client: lends, jobs, calls, model changes, cold clients, files, memory.

    python benchmarks/run.py workers --workers 2 --files FOLDER --json FILE
    python benchmarks/run.py workers --workers 2 --walk jobs --flags=--layout=ring=2 --files FOLDER --json FILE

The client uses ``cudaMallocAsync`` as ComfyUI does; the daemon is started with ``--flags``. ``--walk whole`` runs all
stages, ``--walk jobs`` only those that depend on how the workers compute. If a stage fails, it is named and the next
one runs. Times are the client's, or the workers' (of the slowest rank) where the name says so. Latents are compared
with those that the part ``rival`` wrote to FOLDER.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before torch is imported: ComfyUI's default allocator, with which torch itself cannot share tensors.
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
os.environ["PYTORCH_ALLOC_CONF"] = "backend:cudaMallocAsync"

from measuring import Report, add_device, clean_environment, need_gpus, part_command, print_table

from xditd.client.demo.daemon_process import DaemonProcess


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--walk", choices=("whole", "jobs"), default="whole")
    parser.add_argument("--flags", action="append", default=[], help="a flag of the daemon, --flags=--name=value")
    parser.add_argument("--step-cache", type=float, default=0.0, help="threshold of step caching in jobs")
    parser.add_argument("--lends", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold-clients", type=int, default=5)
    parser.add_argument("--files", type=Path, required=True, help="folder of the part files, written if needed")
    parser.add_argument(
        "--cold-client", type=Path, metavar="RUNTIME_DIR", help="run as a cold client of the daemon in this folder"
    )
    parser.add_argument("--seed", type=int, default=10, help="of a cold client's weights")
    parser.add_argument("--log", type=Path, help="keep the daemon's log here")


def run(given: argparse.Namespace, report: Report) -> None:
    if given.cold_client:
        from workers_walk import run_cold_client

        run_cold_client(given, report)
        return
    need_gpus("workers", given.workers, given.device)
    if not (given.files / "made.json").exists():
        command = part_command("files", given.files, "--device", given.device, *(["--small"] if given.small else []))
        subprocess.run(command, check=True, env=clean_environment())
    with tempfile.TemporaryDirectory(prefix="xditd-workers-") as folder:
        given.began = time.perf_counter()
        daemon = DaemonProcess(given.log or Path(folder, "daemon.log"), given.workers, given.device, given.flags)
        try:
            from workers_walk import WALKS, Walk  # imports torch while the workers import theirs

            walk = Walk(given, report, daemon)
            walk.run(WALKS[given.walk])
            walk.close()
        finally:
            daemon.stop(None)
    found, rows = report.found, []
    for what, how in (("latents", "client_ms"), ("image", "client_ms"), ("denoise", "kept_ms")):
        if what in found:
            rows.append((what, f"{statistics.median(found[what][how]):.1f} ms"))
    rows += [(f"error against {rival}", f"{error:.1e}") for rival, error in found.get("parity", {}).items()]
    if rows:
        print_table(f"{given.workers} worker(s), medians", rows)
    if "start" in walk.failed:
        sys.exit(walk.failed["start"])
