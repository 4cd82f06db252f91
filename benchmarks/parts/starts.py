"""Measure a user's first minute: start, first and later lends and jobs, memory after jobs, a rebuilt group.

    python benchmarks/run.py starts --workers 2 --json FILE
    python benchmarks/run.py starts --device cpu --small --workers 2

The client fills its weights while the workers start, as programs do that load a model meanwhile. Each round starts a
daemon, ends with a rank that is killed, and has a client of its own. The libraries' files are in the page cache from
the second round on.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import flux
import torch
from machine import gpu_memory_by_process
from measuring import GIB, Report, add_device, need_gpus, print_table, say, timed

from xditd.client import Client, Loan
from xditd.client.arenas import Arena
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.client.waiting import wait_for

DEADLINE_S: Final = 120.0
BARS: Final = (
    ("daemon start to the first job's end", "first_job_end_s", 12.0, "s"),
    ("rebuilt group", "rebuilt_s", 4.0, "s"),
    ("first lend / later lends", "lend_ratio", 1.3, "x"),
    ("first job / later jobs", "job_ratio", 1.3, "x"),
    ("memory beyond weights, each GPU", "beyond_gib", 3.0, "GiB"),
)
"""What is measured, its name in the report, and the most that it should be."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="later lends and jobs of a round")
    parser.add_argument("--steps", type=int, default=4, help="of each job")
    parser.add_argument("--standby", choices=("on", "off"), default="on", help="of the daemon")
    parser.add_argument("--announce", choices=("on", "off"), default="on", help="whether the client prepares its model")
    parser.add_argument("--flags", action="append", default=[], help="a flag of the daemon, --flags=--name=value")
    parser.add_argument("--log", type=Path, help="keep the last daemon's log here")


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("starts", given.workers, given.device)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="xditd-starts-") as folder:
        for number in range(given.rounds):
            say(f"  round {number + 1}")
            rounds.append(Round(given, given.log or Path(folder, "daemon.log")).run())
            report.add(workers=given.workers, standby=given.standby, rounds=rounds)
    show(rounds, given.standby)


def show(rounds: list[dict[str, Any]], standby: str) -> None:
    """Print the phases of each round, then the bars."""
    names = list(dict.fromkeys(name for found in rounds for name in found))
    rows = [(name, *(f"{found[name]:.3g}" if name in found else "-" for found in rounds)) for name in names]
    print_table(f"starts, standby {standby}", rows)
    rows = []
    for what, name, most, unit in BARS:
        values = [found[name] for found in rounds if name in found]
        if values:
            value = statistics.median(values)
            rows.append((what, f"{value:.2f} {unit}", f"bar {most:g}", f"{value / most:.2f} of it"))
    print_table("bars, medians of the rounds", rows)


class Round:
    """One daemon from its start to its end."""

    def __init__(self, given: argparse.Namespace, log: Path) -> None:
        self._given = given
        self._log = log
        self._scale = flux.scale_of(given)
        self._device = str(flux.device_of(given))
        self._found: dict[str, Any] = {}
        self._inputs = {
            "prompt_embeds": torch.zeros(1, self._scale.tokens, 4096, dtype=flux.dtype_on(given.device)),
            "pooled_prompt_embeds": torch.zeros(1, 768, dtype=flux.dtype_on(given.device)),
        }

    def run(self) -> dict[str, Any]:
        flags = [*self._given.flags, "--standby", self._given.standby]
        self._began_s = time.perf_counter()
        daemon = DaemonProcess(self._log, self._given.workers, self._given.device, flags)
        arenas: list[Arena] = []
        try:
            client = daemon.connect()
            self._note("daemon_answers_s")
            shapes = flux.shapes(self._scale.size, flux.dtype_on(self._given.device))
            if self._given.announce == "on":
                meta = {name: torch.empty(shape, dtype=kind, device="meta") for name, (kind, shape) in shapes.items()}
                client.prepare(meta)
            for seed in (0, 1):
                arenas.append(Arena(shapes, self._device))
                flux.fill(arenas[-1].tensors, seed)
            self._note("weights_made_s")
            daemon.wait_ready(client, lambda _: None)
            self._note("workers_ready_s")
            loan = self._measure_lends_and_jobs(client, arenas)
            self._measure_memory(sum(arena.size_bytes for arena in arenas[:1]))
            self._measure_rebuild(client, loan)
            self._read_log()
            client.close()
        finally:
            began_s = time.perf_counter()
            daemon.stop(None)
            self._found["stop_s"] = time.perf_counter() - began_s
        for arena in arenas:  # the client's memory: after the daemon, which had it mapped
            arena.close()
        return self._found

    def _note(self, name: str) -> None:
        self._found[name] = time.perf_counter() - self._began_s

    def _measure_lends_and_jobs(self, client: Client, arenas: list[Arena]) -> Loan:
        loan, first_lend_ms = timed(lambda: client.lend(arenas[0].tensors))
        _, first_job_ms = timed(lambda: self._job(client, loan))
        self._note("first_job_end_s")
        lends, jobs = [], []
        for number in range(1, self._given.repeats + 1):
            loan.return_()
            loan, took_ms = timed(lambda number=number: client.lend(arenas[number % 2].tensors))
            lends.append(took_ms)
            jobs.append(timed(lambda loan=loan: self._job(client, loan))[1])
        self._found |= {
            "first_lend_ms": first_lend_ms,
            "later_lend_ms": statistics.median(lends),
            "lend_ratio": first_lend_ms / statistics.median(lends),
            "first_job_ms": first_job_ms,
            "later_job_ms": statistics.median(jobs),
            "job_ratio": first_job_ms / statistics.median(jobs),
        }
        return loan

    def _job(self, client: Client, loan: Loan) -> Any:
        pixels = self._scale.pixels
        return client.generate(
            loan, self._inputs, height=pixels, width=pixels, steps=self._given.steps, seed=0
        ).result()

    def _measure_memory(self, lent_bytes: int) -> None:
        """Note the memory of the workers beyond the copies of lent weights, which all but the lender's GPU have."""
        if self._given.device == "cpu":
            return
        by_process = gpu_memory_by_process()
        by_process.pop(os.getpid(), None)
        workers = self._given.workers
        self._found["beyond_gib"] = (sum(by_process.values()) - lent_bytes * (workers - 1)) / workers / GIB

    def _measure_rebuild(self, client: Client, loan: Loan) -> None:
        """Kill a rank once the standby, if there is one, has imported; time the new group and its first job."""
        if self._given.standby == "on":
            _wait_for_line(self._log, "leader has imported what ranks share", 3)  # of the standby the second and third
        before = client.status()
        os.kill(before.workers[-1].pid, signal.SIGKILL)
        began_s = time.perf_counter()
        while client.status().counters.group_starts == before.counters.group_starts:
            time.sleep(0.005)
        wait_for(client.status, DEADLINE_S, workers=True, show=lambda _: None)
        self._found["rebuilt_s"] = time.perf_counter() - began_s
        self._job(client, loan)
        self._found["rebuilt_job_end_s"] = time.perf_counter() - began_s

    def _read_log(self) -> None:
        """Note what the leader and the ranks say of the first start's imports."""
        text = self._log.read_text(errors="replace")
        for name, pattern in (
            ("leader_imports_s", r"leader has imported what ranks share imports_s=([\d.]+)"),
            ("rank_imports_s", r"rank started rank=0 imports_s=([\d.]+)"),
            ("lend_imports_s", r"what lends need is imported imports_s=([\d.]+)"),
            ("group_start_s", r"workers ready.* start_s=([\d.]+)"),
        ):
            found = re.search(pattern, text)
            if found:
                self._found[name] = float(found[1])


def _wait_for_line(log: Path, words: str, count: int) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while log.read_text(errors="replace").count(words) < count:
        if time.monotonic() > end_s:
            raise SystemExit(f"{log}: {count} lines with {words!r} were expected within {DEADLINE_S:g} s")
        time.sleep(0.05)
