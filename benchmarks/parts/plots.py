"""Plot the suite's results: the time to a first image by phase, and the time of a step beside its floor.

    python benchmarks/run.py plots benchmarks/results/suite_2x_h200.json docs

Writes ``phases.png`` and ``steps.png`` into the folder. Figures that the report lacks are left out and named on stderr.

Needs: matplotlib (pip install 'xditd[bench]'), and a report of the suite
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from measuring import Report, skip
from suite_figures import Figure, Missing, SuiteReport

SHOWS_MACHINE = True
COLOURS = {
    "start and imports": "#9aa5b1",
    "load": "#d1495b",
    "lend": "#edae49",
    "steps": "#00798c",
    "decode": "#30638e",
}
OURS, THEIRS = "#00798c", "#9aa5b1"
RIVALS = ("diffusers", "context-parallel-2", "xfuser-1", "xfuser-2")
WIDTH_INCHES = 9.0
DOTS_PER_INCH = 120
Found = TypeVar("Found")


def collect(asked: dict[str, Callable[[], Found]]) -> dict[str, Found]:
    """Return the figures that the report has, by label."""
    found = {}
    for label, ask in asked.items():
        try:
            found[label] = ask()
        except Missing as missing:
            print(f"left out: {label}: {missing}", file=sys.stderr)
    return found


def draw_phases(report: SuiteReport, target: Path) -> None:
    """Draw stacked bars of the seconds to a first image: rivals, a starting daemon, clients of a warm daemon."""
    asked: dict[str, Callable[[], dict[str, float]]] = {
        name: partial(report.rival_phases, name) for name in RIVALS if name in report.parts
    }
    for workers in sorted(report.groups):
        asked[f"xditd-{workers}, with its start"] = partial(report.start_phases, workers)
        asked[f"xditd-{workers}, warm"] = partial(report.cold_phases, workers)
    bars = collect(asked)
    figure, axes = bars_figure(list(bars))
    named = set()
    for row, phases in enumerate(bars.values()):
        left = 0.0
        for phase, took_s in phases.items():
            label = None if phase in named else phase
            named.add(phase)
            axes.barh(row, took_s, left=left, color=COLOURS[phase], label=label)
            left += took_s
        axes.annotate(f" {left:.1f} s", (left, row), va="center")
    axes.margins(x=0.08)
    axes.set_xlabel(f"seconds to a first image, {report.made['steps']} steps, {report.made['pixels']} pixels")
    save_figure(figure, axes, report, target)


def draw_steps(report: SuiteReport, target: Path) -> None:
    """Draw bars of milliseconds a step, with the floor of as many GPUs if the report has one."""
    asked: dict[str, Callable[[], float]] = {}
    gpus = {}
    for name in RIVALS:
        if name in report.parts:
            gpus[name] = int(name[-1]) if name[-1].isdecimal() else 1
            asked[name] = partial(median, report.rival_step, name)
    for workers in sorted(report.groups):
        for part, how in ((f"plain-{workers}", ", plain kernels"), (f"workers-{workers}", "")):
            if part in report.parts:
                label = f"xditd-{workers}{how}"
                gpus[label] = workers
                asked[label] = partial(median, report.step, part)
    bars = dict(sorted(collect(asked).items(), key=lambda bar: gpus[bar[0]]))
    figure, axes = bars_figure(list(bars))
    has_floor = False
    for row, (label, took_ms) in enumerate(bars.items()):
        axes.barh(row, took_ms, color=OURS if label.startswith("xditd") else THEIRS)
        axes.annotate(f" {took_ms:.1f} ms", (took_ms, row), va="center")
        for floor_ms in collect({f"floor of {label}": partial(report.floor_ms, gpus[label])}).values():
            axes.plot([floor_ms] * 2, [row - 0.45, row + 0.45], "k--", label=None if has_floor else "floor")
            has_floor = True
    axes.margins(x=0.12)
    axes.set_xlabel(f"milliseconds a step, {report.made['pixels']} pixels, {report.made['tokens']} text tokens")
    save_figure(figure, axes, report, target)


def median(ask: Callable[[str], Figure], part: str) -> float:
    return ask(part).median


def save_figure(figure: Any, axes: Any, report: SuiteReport, target: Path) -> None:
    machine = report.machine
    where = f"{len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else machine["cpu"]
    axes.set_title(f"{report.made['parameters'] / 1e9:.3g} B parameters, {where}", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=len(COLOURS), fontsize="small")
    figure.savefig(target, dpi=DOTS_PER_INCH)
    print(target)


def bars_figure(labels: list[str]) -> tuple[Any, Any]:
    """Make an empty bar chart with the first label on top."""
    try:
        from matplotlib.figure import Figure as Canvas  # without pyplot: files, no window
    except ModuleNotFoundError:
        skip("plots: needs matplotlib (pip install 'xditd[bench]')")

    figure = Canvas(figsize=(WIDTH_INCHES, 1.3 + 0.45 * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    return figure, axes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, help="file that the suite wrote with --json")
    parser.add_argument("folder", type=Path)


def run(given: argparse.Namespace, _: Report) -> None:
    report = SuiteReport(json.loads(given.report.read_text()))
    given.folder.mkdir(parents=True, exist_ok=True)
    draw_phases(report, given.folder / "phases.png")
    draw_steps(report, given.folder / "steps.png")
