"""Everything that is measured, beside what a user would pick instead, in one run and one table.

    python benchmarks/suite.py --json benchmarks/results/suite_2x_h200.json     # FLUX.1-dev size, on the GPUs here
    python benchmarks/suite.py --device cpu --small                             # ratios only: two cores, minutes
    python benchmarks/suite.py --only 'workers-*' --resume --json FILE          # some parts, into an earlier report

Each part is a program of its own, which gives its memory back when it ends, and reports to a file as it goes. The JSON
file is written after every part, so that a run that is cut short leaves what it had; parts that failed, were refused or
were not begun keep their place in the table, with the reason. ``plots.py`` draws the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from machine import describe_machine, roomy_folder
from measuring import add_arguments, say
from suite_table import print_tables

from xditd.client.output_files import write_file

HERE = Path(__file__).resolve().parent
FILES_BYTES = 50 * 2**30
"""Two checkpoints of FLUX.1-dev's size, a VAE, and room to write."""
END_S = 45.0
LAYOUTS = ("ring=2", "cfg=2")
STEP_CACHE = 0.08


@dataclass(frozen=True)
class Part:
    """A program of the suite. ``estimate_s`` is for full size on two H200; it may take three times as long."""

    name: str
    program: str
    arguments: tuple[str, ...]
    estimate_s: float
    reads_files: bool = True
    leaves: str | None = None
    """A file among those of the run that later parts read: with files made anew, the part has to run again."""


def parts_for(gpus: int, small: bool) -> list[Part]:
    """All parts, what matters most first. On CPUs, ranks stand for GPUs."""
    groups = sorted({1, gpus}, reverse=True)
    few = ("--repeats", "3", "--lends", "3", "--cold-clients", "1") if small else ()
    rival_few = ("--repeats", "3") if small else ()

    def walk(name: str, workers: int, estimate_s: float, *more: str) -> Part:
        return Part(name, "workers_part.py", ("--workers", str(workers), *few, *more), estimate_s)

    def jobs(name: str, workers: int, *more: str) -> Part:
        return walk(name, workers, 45.0, "--walk", "jobs", *more)

    def rival(name: str, ranks: int) -> Part:
        label = name if ranks == 1 and name == "diffusers" else f"{name}-{ranks}"
        leaves = f"latents_{name}_{ranks}.safetensors"
        return Part(label, "rival.py", (name, "--ranks", str(ranks), *rival_few), 50.0, leaves=leaves)

    parts = [Part("ceilings", "ceilings.py", (), 15.0, reads_files=False), rival("diffusers", 1)]
    for workers in groups:
        parts += [rival("xfuser", workers), walk(f"workers-{workers}", workers, 130.0)]
    parts += [Part(f"load-{way}", "rival_loads.py", (way, *rival_few), 40.0) for way in ("pretrained", "single-file")]
    parts.append(Part("load-safetensors", "rival_loads.py", ("load-file", *rival_few), 35.0))
    parts.append(Part("tensor-ipc", "rival_tensor_ipc.py", rival_few, 25.0, reads_files=False))
    if gpus > 1:
        parts.append(rival("context-parallel", gpus))
    if gpus == 2:
        parts += [jobs(f"layout-{layout}", 2, f"--flags=--layout={layout}") for layout in LAYOUTS]
    for workers in groups:
        parts.append(jobs(f"plain-{workers}", workers, "--flags=--kernels=plain"))
        parts.append(jobs(f"fp8-{workers}", workers, "--flags=--precision=fp8"))
        parts.append(jobs(f"step-cache-{workers}", workers, "--step-cache", str(STEP_CACHE)))
    return parts


class Suite:
    """One run: its files, its clock, and what was found."""

    def __init__(self, given: argparse.Namespace, files: Path, outs: Path) -> None:
        self.given = given
        self.files = files
        self.outs = outs
        self.began = time.monotonic()
        self.report: dict[str, Any] = {"machine": describe_machine(), "made": {}, "parts": {}}
        if given.resume and given.json.exists():
            self._take_over(json.loads(given.json.read_text()))

    def _take_over(self, earlier: dict[str, Any]) -> None:
        if earlier["machine"] != self.report["machine"]:
            sys.exit(
                f"{self.given.json} is of another machine or other versions; figures of two do not go in one table"
            )
        self.report = earlier

    def make_files(self) -> None:
        self.files.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "checkpoint_files.py"), str(self.files), *self._common()]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
        if done.returncode:
            sys.exit("the files were not written")
        made = json.loads(done.stdout.splitlines()[-1])
        if self.report["made"] not in ({}, made):
            sys.exit(f"{self.given.json}: of another size; two do not go in one table")
        self.report["made"] = made

    def has(self, part: Part) -> bool:
        """Whether a part needs not run: an earlier run found all, and what it left is still there."""
        found = self.report["parts"].get(part.name)
        is_left = part.leaves is None or (self.files / part.leaves).exists()
        return found is not None and "failed" not in found and is_left

    def run(self, part: Part) -> None:
        """Run one part and keep what it found, or the reason why it found nothing."""
        spent_s = time.monotonic() - self.began
        if spent_s + part.estimate_s > self.given.deadline:
            say(f"{part.name} is not begun: it takes {part.estimate_s:.0f} s, and {spent_s:.0f} s are over")
            self.report["parts"].setdefault(part.name, {"failed": f"not begun, {spent_s:.0f} s were over"})
            return
        say(f"{part.name} (at {spent_s:.0f} s)")
        out, log = self.outs / f"{part.name}.json", self.outs / f"{part.name}.log"
        out.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / part.program), *part.arguments, *self._common(), "--out", str(out)]
        command += ["--files", str(self.files)] if part.reads_files else []
        command += ["--began", str(time.time())] if part.program == "rival.py" else []
        started = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=clean_environment())
            reason = wait(process, self.given.patience * part.estimate_s)
        found = json.loads(out.read_text()) if out.exists() else {}
        found["took_s"] = time.monotonic() - started
        if process.returncode or reason:
            found["failed"] = reason or refusal(found) or last_line(log)
            say(f"{part.name} failed: {found['failed']}")
        self.report["parts"][part.name] = found
        self.write()

    def write(self) -> None:
        """Keep what was measured so far, should the rest fail."""
        if self.given.json is not None:
            self.given.json.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.given.json, json.dumps(self.report, indent=1).encode(), b"\n")

    def _common(self) -> list[str]:
        return ["--device", self.given.device, *(["--small"] if self.given.small else [])]


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


def refusal(found: dict[str, Any]) -> str | None:
    """Why a worker group did not start: the last line of the daemon's log, which the message ends with."""
    lines = found.get("failed_stages", {}).get("start", "").splitlines()
    return str(lines[-1].partition(" ERROR ")[2] or lines[-1]) if lines else None


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "ended without a word"


def clean_environment() -> dict[str, str]:
    """No hub, and no allocator but each program's own choice."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH")}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PART", help="names of parts, with * and ?")
    parser.add_argument("--list", action="store_true", help="name the parts with their estimates in seconds, and stop")
    parser.add_argument("--json", type=Path, help="write everything here, after every part")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds, if it is there")
    parser.add_argument("--files", type=Path, help="folder of checkpoints, made if need be and kept (default: for now)")
    parser.add_argument("--deadline", type=float, default=3600.0, help="begin no part that would end after so many s")
    parser.add_argument("--patience", type=float, default=3.0, help="end a part after so many times its estimate")
    parser.add_argument("--logs", type=Path, help="keep the logs of all parts in this folder")
    return parser


def main() -> int:
    given = build_parser().parse_args()
    if given.resume and given.json is None:
        sys.exit("--resume needs --json, the report to go on with")
    gpus = len(describe_machine()["gpus"]) if given.device == "cuda" else 2
    parts = [part for part in parts_for(gpus, given.small) if any(fnmatch(part.name, each) for each in given.only)]
    if given.list:
        print("\n".join(f"{part.name:24} {part.estimate_s:5.0f}" for part in parts))
        return 0
    if not gpus:
        sys.exit("no GPU here; --device cpu --small makes a dry run")
    scratch = None if given.files else roomy_folder(2**30 if given.small else FILES_BYTES)
    with tempfile.TemporaryDirectory(prefix="xditd-suite-", dir=scratch) as folder:
        if given.logs is not None:
            given.logs.mkdir(parents=True, exist_ok=True)
        suite = Suite(given, given.files or Path(folder, "files"), given.logs or Path(folder))
        suite.make_files()
        for part in parts:
            if not suite.has(part):
                suite.run(part)
        suite.write()
    print_tables(suite.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
