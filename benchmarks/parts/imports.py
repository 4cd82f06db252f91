"""Profile what the leader and a rank import before they are ready, for the first lend, and after it.

    python benchmarks/run.py imports --json FILE

The stages run one after the other in one process, twice: plainly for the processor time, and under ``python -X
importtime`` for the modules. A module's time is that of all it imports; the heaviest of each stage are listed.

Needs: the workers' libraries; no GPU
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from typing import Any, Final

from measuring import Report, clean_environment, print_table

PROGRAM: Final = """
import sys, time
def stage(name):
    global began_s
    print(f"stage: {name} {time.process_time() - began_s:.3f}", file=sys.stderr, flush=True)
    began_s = time.process_time()
began_s = time.process_time()
from xditd.gpu_workers.process.garbage_collection import without_collections
from xditd.gpu_workers.process.lazy_meta_kernels import defer_meta_kernels
with without_collections():
    defer_meta_kernels()
    from xditd.gpu_workers.process import leader, preload
    stage("torch, in the leader")
    preload.preload(preload.FOR_RANKS)
    stage("shared by ranks, in the leader")
from xditd.gpu_workers.process import lean_imports, xfuser_cpu
with xfuser_cpu.importable():
    lean_imports.import_xfuser()
from xditd.gpu_workers.process.torch_executor import TorchExecutor
from xditd.gpu_workers.process.late_imports import LateImports
stage("own, in each rank")
imports = LateImports()
imports.finish_for_lend()
stage("for lends, in each rank once it is ready")
while imports.wait_s is not None:
    imports.run_next()
stage("for later, in each rank while it is idle")
"""
_LINE: Final = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|( *)(\S+)")
_STAGE: Final = re.compile(r"stage: (.*) ([\d.]+)$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heaviest", type=int, default=6, help="modules to list of each stage")


def run(given: argparse.Namespace, report: Report) -> None:
    plain = _profile([])
    traced = _profile(["-X", "importtime"])
    for name, found in traced.items():
        heaviest = sorted(found["modules"], key=lambda each: -each[1])[: given.heaviest]
        report.add(**{name: {"cpu_s": plain[name]["cpu_s"], "modules": found["count"], "heaviest_ms": dict(heaviest)}})
        rows = [(module, f"{took_ms:.0f} ms") for module, took_ms in heaviest]
        print_table(f"{name}: {plain[name]['cpu_s']:.2f} s of processor time, {found['count']} modules", rows)


def _profile(options: list[str]) -> dict[str, dict[str, Any]]:
    """Return processor time, number of modules and milliseconds by module of each stage."""
    done = subprocess.run(
        [sys.executable, *options, "-c", PROGRAM], capture_output=True, text=True, env=clean_environment(), check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    stages: dict[str, dict[str, Any]] = {}
    modules: list[tuple[str, float]] = []
    for line in done.stderr.splitlines():
        if imported := _LINE.match(line):
            modules.append((imported[4], int(imported[2]) / 1e3))
        elif ended := _STAGE.match(line):
            stages[ended[1]] = {"cpu_s": float(ended[2]), "modules": modules, "count": len(modules)}
            modules = []
    return stages
