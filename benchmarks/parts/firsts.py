"""Compare the first lend and the first job after a start with later ones, without and with an announcement before.

    python benchmarks/run.py firsts --workers 1 --json FILE
    python benchmarks/run.py firsts --device cpu --small --workers 2

Each round has a daemon of its own: in turns one to which nothing is announced, and one whose client calls ``prepare``
before it makes its weights. The client waits for the workers either way, so that starts are not part of any time.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

import flux
import torch
from measuring import Report, add_device, need_gpus, print_table, say, timed

from xditd.client.arenas import Arena
from xditd.client.demo.daemon_process import DaemonProcess

BAR: Final = 1.3
WAYS: Final = ("plain", "prepared")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="daemons of each way")
    parser.add_argument("--repeats", type=int, default=4, help="later lends and jobs of a round")
    parser.add_argument("--steps", type=int, default=4, help="of each job")
    parser.add_argument("--log", type=Path, help="keep the last daemon's log here")
    parser.add_argument("--idle-s", type=float, default=6.0, help="from ready workers to the first lend")


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("firsts", given.workers, given.device)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="xditd-firsts-") as folder:
        for number in range(given.rounds):
            for way in WAYS:
                say(f"  round {number + 1}: {way}")
                found[way].append(_round(given, given.log or Path(folder, "daemon.log"), prepares=way == "prepared"))
                report.add(workers=given.workers, rounds=found)
    ratios = {f"{what}_{way}": _ratio(found[way], what) for what in ("lend", "job") for way in WAYS}
    report.add(ratios=ratios)
    rows = [("ms", *(f"{what}, {way}" for what in ("lend", "job") for way in WAYS))]
    rows += [
        (when, *(f"{_median(found[way], f'{when}_{what}_ms'):.1f}" for what in ("lend", "job") for way in WAYS))
        for when in ("first", "later")
    ]
    rows.append(("first / later", *(f"{ratio:.2f}" for ratio in ratios.values())))
    rows.append((f"bar {BAR:g}", *("held" if ratio <= BAR else "missed" for ratio in ratios.values())))
    print_table(f"first and later lends and jobs, {given.workers} workers, medians of {given.rounds} rounds", rows)


def _round(given: argparse.Namespace, log: Path, *, prepares: bool) -> dict[str, float]:
    scale, dtype, device = flux.scale_of(given), flux.dtype_on(given.device), str(flux.device_of(given))
    shapes = flux.shapes(scale.size, dtype)
    inputs = {
        "prompt_embeds": torch.zeros(1, scale.tokens, 4096, dtype=dtype),
        "pooled_prompt_embeds": torch.zeros(1, 768, dtype=dtype),
    }
    arenas: list[Arena] = []
    daemon = DaemonProcess(log, given.workers, given.device, ["--standby", "off"])
    try:
        client = daemon.connect()
        if prepares:
            client.prepare(
                {name: torch.empty(shape, dtype=kind, device="meta") for name, (kind, shape) in shapes.items()}
            )
        for seed in (0, 1):
            arenas.append(Arena(shapes, device))
            flux.fill(arenas[-1].tensors, seed)
        daemon.wait_ready(client, lambda _: None)
        time.sleep(given.idle_s)
        client.check_memory()  # once for each client, whatever it lends
        lends, jobs = [], []
        for number in range(1 + given.repeats):
            loan, took_ms = timed(lambda number=number: client.lend(arenas[number % 2].tensors))
            lends.append(took_ms)
            for _ in range(2 if number else 1):  # later jobs are those whose weights have run before
                generate = lambda loan=loan: client.generate(  # noqa: E731
                    loan, inputs, height=scale.pixels, width=scale.pixels, steps=given.steps, seed=0
                ).result()
                _, job_ms = timed(generate)
            jobs.append(job_ms)
            loan.return_()
        client.close()
    finally:
        daemon.stop(None)
    for arena in arenas:
        arena.close()
    return {
        "first_lend_ms": lends[0],
        "later_lend_ms": statistics.median(lends[1:]),
        "first_job_ms": jobs[0],
        "later_job_ms": statistics.median(jobs[1:]),
    }


def _median(rounds: list[dict[str, float]], name: str) -> float:
    return statistics.median(each[name] for each in rounds)


def _ratio(rounds: list[dict[str, float]], what: str) -> float:
    return statistics.median(each[f"first_{what}_ms"] / each[f"later_{what}_ms"] for each in rounds)
