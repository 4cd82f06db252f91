"""Print and plot how much faster several GPUs are than one, by model and size.

    python benchmarks/run.py modules --sizes standard large --workers 1 2 4 --json FILE
    python benchmarks/run.py speedup FILE docs/speedup.png

A line for each model and size: the time of a call by one worker over that by several, beside the ideal, which is the
number of GPUs. The table also has the share of the ideal.

Needs: matplotlib (pip install 'xditd[bench]'), and a report of the part modules with several numbers of workers
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from measuring import Report, print_table, skip

SHOWS_MACHINE = True
DOTS_PER_INCH = 120
_LABEL = re.compile(r"(?P<model>.+), (?P<acceleration>\w+), (?P<workers>\d+) workers")

Speedups = dict[str, dict[int, float]]
"""By model, size and acceleration: the speed-up by the number of workers."""


def speedups(report: dict[str, Any]) -> tuple[Speedups, Speedups]:
    """Return milliseconds of a call, and speed-ups, of every model that one worker and others have run."""
    took: Speedups = {}
    for label, each in report.items():
        if isinstance(each, dict) and (found := _LABEL.fullmatch(label)):
            acceleration = found["acceleration"]
            name = found["model"] if acceleration == "auto" else f"{found['model']}, {acceleration}"
            took.setdefault(name, {})[int(found["workers"])] = each["in_a_row_ms"]
    took = {name: dict(sorted(each.items())) for name, each in took.items() if 1 in each and len(each) > 1}
    return took, {name: {ranks: each[1] / ms for ranks, ms in each.items()} for name, each in took.items()}


def draw(found: Speedups, title: str, target: Path) -> None:
    try:
        from matplotlib.figure import Figure as Canvas  # without pyplot: files, no window
    except ModuleNotFoundError:
        skip("speedup: needs matplotlib (pip install 'xditd[bench]')")

    figure = Canvas(figsize=(7.0, 5.0), layout="constrained")
    axes = figure.subplots()
    ranks = sorted({each for speeds in found.values() for each in speeds})
    axes.plot(ranks, ranks, "k--", label="ideal")
    for name, speeds in found.items():
        axes.plot(list(speeds), list(speeds.values()), "o-", label=name)
    axes.set_xticks(ranks)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("times as fast as one GPU")
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DOTS_PER_INCH)
    print(target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, help="file that the part modules wrote with --json")
    parser.add_argument("picture", type=Path, help="PNG or SVG to write")


def run(given: argparse.Namespace, report: Report) -> None:
    measured = json.loads(given.report.read_text())
    took, found = speedups(measured)
    if not found:
        raise SystemExit(
            f"{given.report}: no model with times of 1 and of more workers; run the part modules with --workers 1 2"
        )
    report.add(speedups=found)
    rows = [("model", "workers", "one call", "speed-up", "of the ideal")]
    for name, speeds in found.items():
        for ranks, speed in speeds.items():
            rows.append((name, str(ranks), f"{took[name][ranks]:.1f} ms", f"{speed:.2f}x", f"{speed / ranks:.0%}"))
    print_table("times of calls in a row, by GPUs", rows)
    machine = measured.get("machine", {})
    gpus = machine.get("gpus", [])
    draw(found, f"{len(gpus)} x {gpus[0]}" if gpus else str(machine.get("cpu", "")), given.picture)
