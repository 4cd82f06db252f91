"""Run all benchmarks of the daemon, and of the programs that users could run instead, and print one table.

    python benchmarks/run.py suite --json benchmarks/results/suite_2x_h200.json     # FLUX.1-dev size, on the GPUs here
    python benchmarks/run.py suite --device cpu --small                             # ratios only: two cores, minutes
    python benchmarks/run.py suite --only 'workers-*' --resume --json FILE          # some stages, into that report
    python benchmarks/run.py suite --show benchmarks/results/suite_2x_h200.json     # the tables of an earlier report

Each stage runs another part in a process of its own, which frees its memory when it ends. An interrupted run leaves
what it has. Stages that failed, were refused or were not started keep their place in the table, with the reason. The
part ``plots`` draws the JSON.

Needs: a GPU; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from machine import describe_machine, temporary_folder
from measuring import Report, add_device, clean_environment, need_gpus, part_command, say
from parts import files
from suite_table import print_tables

SHOWS_MACHINE = True
FILES_BYTES = 50 * 2**30
"""Disk space for two checkpoints of FLUX.1-dev's size and a VAE."""
END_S = 45.0
LAYOUTS = ("ring=2", "cfg=2")
STEP_CACHE = 0.08


@dataclass(frozen=True)
class Stage:
    """A part with its arguments. ``estimate_s`` is for full size on two H200; ``--patience`` multiplies it."""

    name: str
    part: str
    arguments: tuple[str, ...]
    estimate_s: float
    reads_files: bool = True
    leaves: str | None = None
    """File in the run's folder that later stages read; if it is missing, the stage has to run again."""


def stages_for(gpus: int, small: bool) -> list[Stage]:
    """Return all stages, the most important first. On a CPU, ``gpus`` is the number of ranks."""
    groups = sorted({1, gpus}, reverse=True)
    few = ("--repeats", "3", "--lends", "3", "--cold-clients", "1") if small else ()
    rival_few = ("--repeats", "3") if small else ()

    def measure_group(name: str, workers: int, estimate_s: float, *more: str) -> Stage:
        return Stage(name, "workers", ("--workers", str(workers), *few, *more), estimate_s)

    def jobs(name: str, workers: int, *more: str) -> Stage:
        return measure_group(name, workers, 45.0, "--walk", "jobs", *more)

    def rival(name: str, ranks: int) -> Stage:
        label = name if ranks == 1 and name == "diffusers" else f"{name}-{ranks}"
        leaves = f"latents_{name}_{ranks}.safetensors"
        return Stage(label, "rival", (name, "--workers", str(ranks), *rival_few), 50.0, leaves=leaves)

    stages = [Stage("ceilings", "ceilings", (), 15.0, reads_files=False), rival("diffusers", 1)]
    for workers in groups:
        stages += [rival("xfuser", workers), measure_group(f"workers-{workers}", workers, 130.0)]
    stages += [Stage(f"load-{way}", "loads", (way, *rival_few), 40.0) for way in ("pretrained", "single-file")]
    stages.append(Stage("load-safetensors", "loads", ("load-file", *rival_few), 35.0))
    stages.append(Stage("tensor-ipc", "tensor_ipc", rival_few, 25.0, reads_files=False))
    if gpus > 1:
        stages.append(rival("context-parallel", gpus))
    if gpus == 2:
        stages += [jobs(f"layout-{layout}", 2, f"--flags=--layout={layout}") for layout in LAYOUTS]
    for workers in groups:
        stages.append(jobs(f"plain-{workers}", workers, "--flags=--kernels=plain"))
        stages.append(jobs(f"fp8-{workers}", workers, "--flags=--precision=fp8"))
        stages.append(jobs(f"step-cache-{workers}", workers, "--step-cache", str(STEP_CACHE)))
    return stages


class Suite:
    """One run: its files, its clock and its results."""

    def __init__(self, given: argparse.Namespace, report: Report, folder: Path, outs: Path) -> None:
        self.given = given
        self.report = report
        self.files = folder
        self.outs = outs
        self.began = time.monotonic()
        self.parts: dict[str, Any] = {}
        made = files.ensure(folder, given)
        if given.resume and given.json.exists():
            earlier = json.loads(given.json.read_text())
            if (earlier["machine"], earlier["made"]) != (describe_machine(), made):
                sys.exit(
                    f"{given.json} is of another machine, other versions or another size; choose another --json file"
                )
            self.parts = earlier["parts"]
        report.add(made=made, parts=self.parts)

    def has(self, stage: Stage) -> bool:
        """Return whether an earlier run has all results of a stage, and its file is still there."""
        found = self.parts.get(stage.name)
        is_left = stage.leaves is None or (self.files / stage.leaves).exists()
        return found is not None and "failed" not in found and is_left

    def run(self, stage: Stage) -> None:
        """Run one stage and keep its results, or the reason why it failed."""
        spent_s = time.monotonic() - self.began
        if spent_s + stage.estimate_s > self.given.deadline:
            limit = f"it takes {stage.estimate_s:.0f} s, and {spent_s:.0f} s of --deadline are over"
            say(f"{stage.name} is not started: {limit}")
            self.parts.setdefault(stage.name, {"failed": f"not started: {limit}"})
            return
        say(f"{stage.name} (at {spent_s:.0f} s)")
        out, log = self.outs / f"{stage.name}.json", self.outs / f"{stage.name}.log"
        out.unlink(missing_ok=True)
        more = ["--device", self.given.device, *(["--small"] if self.given.small else []), "--json", out]
        more += ["--files", self.files] if stage.reads_files else []
        more += ["--log", log.with_suffix(".daemon.log")] if stage.part == "workers" else []
        more += ["--began", time.time()] if stage.part == "rival" else []
        started = time.monotonic()
        with log.open("wb") as stream:
            command = part_command(stage.part, *stage.arguments, *more)
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=clean_environment())
            reason = wait(process, self.given.patience * stage.estimate_s)
        found = json.loads(out.read_text()) if out.exists() else {}
        found.pop("machine", None)
        found["took_s"] = time.monotonic() - started
        if process.returncode or reason:
            found["failed"] = reason or start_error(found) or last_line(log)
            say(f"{stage.name} failed: {found['failed']}")
        self.parts[stage.name] = found
        self.report.add(parts=self.parts)


def wait(process: subprocess.Popen[bytes], limit_s: float) -> str | None:
    """Wait for a part; one that takes longer than it may is asked to end, and then made to."""
    try:
        process.wait(limit_s)
        return None
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return f"took longer than {limit_s:.0f} s"


def start_error(found: dict[str, Any]) -> str | None:
    """Return why a worker group did not start: the last line of the daemon's log, with which the message ends."""
    lines = found.get("failed_stages", {}).get("start", "").splitlines()
    return str(lines[-1].partition(" ERROR ")[2] or lines[-1]) if lines else None


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "ended without output"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="STAGE", help="names of stages, with * and ?")
    parser.add_argument("--list", action="store_true", help="name the stages with their estimates in seconds, and stop")
    parser.add_argument("--show", type=Path, metavar="REPORT", help="print the tables of an earlier report, and stop")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds, if it is there")
    parser.add_argument(
        "--files", type=Path, help="folder of checkpoints, written if needed and kept (default: temporary)"
    )
    parser.add_argument("--deadline", type=float, default=3600.0, help="start no stage that would end after so many s")
    parser.add_argument("--patience", type=float, default=3.0, help="end a stage after so many times its estimate")
    parser.add_argument("--logs", type=Path, help="keep the logs of all stages in this folder")


def run(given: argparse.Namespace, report: Report) -> None:
    if given.show:
        print_tables(json.loads(given.show.read_text()))
        return
    if given.resume and given.json is None:
        sys.exit("--resume needs --json, the report to continue")
    gpus = len(describe_machine()["gpus"]) if given.device == "cuda" else 2
    stages = [each for each in stages_for(gpus, given.small) if any(fnmatch(each.name, name) for name in given.only)]
    if given.list:
        print("\n".join(f"{stage.name:24} {stage.estimate_s:5.0f}" for stage in stages))
        return
    need_gpus("suite", 1, given.device)
    scratch = None if given.files else temporary_folder(2**30 if given.small else FILES_BYTES)
    with tempfile.TemporaryDirectory(prefix="xditd-suite-", dir=scratch) as folder:
        if given.logs is not None:
            given.logs.mkdir(parents=True, exist_ok=True)
        suite = Suite(given, report, given.files or Path(folder, "files"), given.logs or Path(folder))
        for stage in stages:
            if not suite.has(stage):
                suite.run(stage)
        report.add(parts=suite.parts)
    print_tables(report.found)
