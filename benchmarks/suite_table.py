"""The tables of benchmarks/suite.py: what was found, beside its bar and beside what a user would pick instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from suite_figures import Figure, Missing, Report, reason_of

Ask = Callable[[], Figure]


@dataclass(frozen=True)
class Row:
    """One line. ``bar`` is for the figure, or for its ratio to ``rival`` where ``is_bar_of_ratio``."""

    what: str
    ask: Ask
    bar: float | None = None
    beside: str = ""
    rival: Ask | None = None
    is_bar_of_ratio: bool = False
    is_bar_least: bool = False
    """The figure should be at least, not at most, the bar."""

    def cells(self) -> tuple[str, str, str, str]:
        """What, found, against the bar, beside the rival. What is missing gives its reason in the last one."""
        try:
            found = self.ask()
        except Missing as missing:
            return self.what, "-", "", str(missing)
        ratio, beside = None, ""
        if self.rival is not None:
            try:
                other = self.rival()
                ratio = found.median / other.median
                beside = f"{ratio:.3f}x {self.beside} ({other})"
            except Missing as missing:
                beside = f"{self.beside}: {missing}"
        judged = ratio if self.is_bar_of_ratio else found.median
        return self.what, str(found), self._judge(judged, "x" if self.is_bar_of_ratio else found.unit), beside

    def _judge(self, judged: float | None, unit: str) -> str:
        if self.bar is None:
            return ""
        bar = f"{'>=' if self.is_bar_least else '<='} {self.bar:g}{unit if unit == 'x' else f' {unit}'}".rstrip()
        if judged is None:
            return f"{bar}: ?"
        is_met = judged >= self.bar if self.is_bar_least else judged <= self.bar
        return f"{bar}: {'met' if is_met else 'MISSED'}"


def print_tables(raw: dict[str, Any]) -> None:
    report = Report(raw)
    machine, made = report.machine, report.made
    print(f"\n{', '.join(machine['gpus']) or machine['cpu']}; Python {machine['python']}")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(
        f"{made['parameters'] / 1e9:.3g} B parameters, {made['bytes'] / 2**30:.3g} GiB {made['dtype']}, random; "
        f"{made['pixels']} pixels, {made['tokens']} text tokens, {made['steps']} steps. Medians (least-most, runs)."
    )
    for workers in report.groups:
        if reason_of(partial(report.group_line, workers)) is None:
            print(report.group_line(workers))
    is_full = made["parameters"] > 10**10
    for title, rows in tables(report, is_full):
        if rows:
            print(f"\n{title}")
            print_rows([row.cells() for row in rows])
    print_phases(report)
    failed = {name: part["failed"] for name, part in report.parts.items() if "failed" in part}
    if failed:
        print("\nParts that found less than they should")
        for name, reason in failed.items():
            print(f"  {name:20} {reason}")


def print_rows(rows: list[tuple[str, str, str, str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for what, found, bar, beside in rows:
        print(f"  {what:{widths[0]}}  {found:{widths[1]}}  {bar:{widths[2]}}  {beside}".rstrip())


def tables(report: Report, is_full: bool) -> list[tuple[str, list[Row]]]:
    """All tables by title. Bars are stated for full size on two H200 and are left out elsewhere."""

    def bar(value: float) -> float | None:
        return value if is_full else None

    groups = report.groups
    return [
        ("Lending", [row for workers in groups for row in lending(report, workers, bar)]),
        ("Files", [row for workers in groups for row in files(report, workers, bar)] + loads(report)),
        ("Jobs, lossless", [row for workers in groups for row in jobs(report, workers, bar)]),
        ("Layouts on two workers, lossless", layouts(report)),
        ("Memory of GPUs", [row for workers in groups for row in memory(report, workers)]),
        ("Precision traded for speed: NOT lossless", [row for workers in groups for row in traded(report, workers)]),
    ]


def lending(report: Report, workers: int, bar: Callable[[float], float | None]) -> list[Row]:
    label = on(workers)
    rows = [
        Row(
            f"lend, model built{label}",
            partial(report.lend, workers),
            bar(25.0 if workers == 1 else 100.0),
            "torch IPC tensor by tensor, one process",
            report.tensor_ipc,
        ),
        Row(f"  lend again what is lent{label}", partial(report.relend, workers)),
    ]
    rows.append(Row(f"  bytes copied{label}", partial(report.copied_gib, workers)))
    if workers > 1:
        rows.append(
            Row(
                f"  copy to each other GPU{label}",
                partial(report.peer_gb_s, workers),
                bar(0.9),
                "one copy in one piece",
                partial(report.ceiling, "peer_gb_s"),
                is_bar_of_ratio=True,
                is_bar_least=True,
            )
        )
    rows += [
        Row(f"swap: first step against a steady one{label}", partial(report.swap, workers), bar(1.2)),
        Row(f"  built by swaps{label}", partial(report.built_by_swaps, workers), 0),
        Row(f"cold client: lend to image beyond steps{label}", partial(report.cold_client, workers), bar(500.0)),
        Row(f"daemon start to a first image{label}", partial(report.start, workers), bar(30.0)),
    ]
    return rows


def files(report: Report, workers: int, bar: Callable[[float], float | None]) -> list[Row]:
    label, ceiling = on(workers), "upload_0_gb_s" if workers == 1 else "upload_all_gb_s"
    size_gib = report.made["bytes"] / 2**30
    return [
        Row(
            f"lend a warm file{label}",
            partial(report.lend_file, workers),
            beside="from_pretrained to one device",
            rival=partial(report.load, "load-pretrained"),
        ),
        Row(
            f"  bytes to all GPUs{label}",
            partial(report.file_gb_s, workers),
            bar(0.8),
            "pinned memory to as many GPUs",
            partial(report.ceiling, ceiling),
            is_bar_of_ratio=True,
            is_bar_least=True,
        ),
        Row(f"  through an arena of the client{label}", partial(report.lend_file, workers, "through_arena")),
        Row(
            f"lend a cold file{label}",
            partial(report.lend_file, workers, "cold"),
            beside="from_pretrained, cold",
            rival=partial(report.load, "load-pretrained", "cold_ms"),
        ),
        Row(f"own host memory of the largest rank{label}", partial(report.host_gib, workers), bar(size_gib / 4)),
    ]


def loads(report: Report) -> list[Row]:
    rows = []
    for part in ("load-safetensors", "load-single-file", "load-pretrained"):
        if part in report.parts:
            rows.append(Row(f"{part}, warm, one process", partial(report.load, part)))
            if reason_of(partial(report.load, part)) is None:
                rows.append(Row("  cold", partial(report.load, part, "cold_ms")))
    return rows


def jobs(report: Report, workers: int, bar: Callable[[float], float | None]) -> list[Row]:
    label, part, same = on(workers), f"workers-{workers}", f"xfuser-{workers}"
    whole_bar, image_bar = (bar(3300.0), None) if workers == 1 else (bar(2000.0), bar(2100.0))
    rows = [
        Row(
            f"step of generate{label}",
            partial(report.step, part),
            bar(1.01),
            same,
            partial(report.rival_step, same),
            is_bar_of_ratio=True,
        ),
        Row("", partial(report.step, part), None, "diffusers", partial(report.rival_step, "diffusers")),
    ]
    if workers > 1:
        context = f"context-parallel-{workers}"
        rows.append(Row("", partial(report.step, part), None, context, partial(report.rival_step, context)))
    if reason_of(partial(report.floor_ms, workers)) is None:
        floor = Figure((report.floor_ms(workers),), "ms")
        rows.append(Row("", partial(report.step, part), None, "the floor", lambda: floor))
    rows += [
        Row(
            f"all steps to latents{label}", partial(report.job, part), whole_bar, same, partial(report.rival_job, same)
        ),
        Row(
            f"image{label}",
            partial(report.job, part, "image"),
            image_bar,
            same,
            partial(report.rival_image, same),
        ),
        Row(f"  decode{label}", partial(report.decode, part), None, same, partial(report.rival_decode, same)),
        Row(
            f"plain kernels: step{label}",
            partial(report.step, f"plain-{workers}"),
            bar(1.01),
            same,
            partial(report.rival_step, same),
            is_bar_of_ratio=True,
        ),
        Row(
            f"call from the client{label}",
            partial(report.call, part),
            bar(1.02),
            "a step of generate",
            partial(report.step, part),
            is_bar_of_ratio=True,
        ),
        Row(
            f"  sigmas not told before{label}",
            partial(report.call, part, "unforeseen_ms"),
            None,
            "a step of generate",
            partial(report.step, part),
        ),
        Row(
            f"  conditioning sent each time{label}",
            partial(report.call, part, "sent_ms"),
            None,
            "a step of generate",
            partial(report.step, part),
        ),
        Row(f"error after {report.made['parity_steps']} steps{label}", partial(report.parity, part), 0.01),
        Row(f"  differing bits in a second run{label}", lambda: bits(report, part), 0),
        Row(f"  plain kernels{label}", partial(report.parity, f"plain-{workers}"), 0.01),
    ]
    return rows


def layouts(report: Report) -> list[Row]:
    rows = []
    ulysses = "workers-2"
    for part in [ulysses, *sorted(name for name in report.parts if name.startswith("layout-"))]:
        if part not in report.parts:
            continue
        name = "ulysses=2" if part == ulysses else part.removeprefix("layout-")
        rows.append(beside_ulysses(f"{name}: step of generate", report.step, part, ulysses))
        if reason_of(partial(report.step, part)):
            continue
        rows += [
            beside_ulysses("  call", report.call, part, ulysses),
            beside_ulysses("  call, two rows", lambda which: report.call(which, "two_rows_ms"), part, ulysses),
            Row("  error", partial(report.parity, part), 0.01),
            Row("  differing bits in a second run", partial(bits, report, part), 0),
        ]
    return rows


def beside_ulysses(what: str, ask: Callable[[str], Figure], part: str, ulysses: str) -> Row:
    if part == ulysses:
        return Row(what, lambda: ask(part))
    return Row(what, lambda: ask(part), None, "ulysses=2", lambda: ask(ulysses))


def memory(report: Report, workers: int) -> list[Row]:
    label = on(workers)
    return [
        Row(f"workers beyond weights, ready{label}", partial(report.memory_gib, workers, "workers_ready")),
        Row(f"workers beyond weights, after jobs{label}", partial(report.memory_gib, workers, "ran")),
        Row(f"client beyond weights{label}", partial(report.client_gib, workers)),
    ]


def traded(report: Report, workers: int) -> list[Row]:
    rows = []
    for mode in ("fp8", "step-cache"):
        part = f"{mode}-{workers}"
        if part in report.parts:
            rows.append(
                Row(
                    f"{mode}: step of generate{on(workers)}",
                    partial(report.step, part),
                    None,
                    "lossless",
                    partial(report.step, f"workers-{workers}"),
                )
            )
            if reason_of(partial(report.step, part)) is None:
                rows.append(Row("  error", partial(report.parity, part)))
                rows.append(Row("  differing bits in a second run", partial(bits, report, part)))
    return rows


def bits(report: Report, part: str) -> Figure:
    return Figure((0.0 if report.repeats_bits(part) else 1.0,), "")


def on(workers: int) -> str:
    return f", {workers} worker{'s' if workers > 1 else ''}"


def print_phases(report: Report) -> None:
    """Where the time goes, in milliseconds of a lend and in seconds to a first image."""
    print("\nWhere the time goes")
    for workers in report.groups:
        print_line(f"lend{on(workers)}, ms", partial(report.lend_phases, workers), 1)
    for workers in report.groups:
        print_line(f"cold client{on(workers)}, s", partial(report.cold_phases, workers))
        print_line(f"daemon start{on(workers)}, s", partial(report.start_phases, workers))
    for part in sorted(name for name in report.parts if name.startswith(("diffusers", "xfuser", "context"))):
        print_line(f"{part}, s", partial(report.rival_phases, part))


def print_line(what: str, ask: Callable[[], dict[str, float]], digits: int = 2) -> None:
    try:
        phases = ask()
    except Missing as missing:
        print(f"  {what:28} - {missing}")
        return
    total = sum(phases.values())
    parts = ", ".join(f"{name} {took:.{digits}f}" for name, took in phases.items() if took >= 10**-digits)
    print(f"  {what:28} {total:.{digits}f}: {parts}")


if __name__ == "__main__":
    print_tables(json.loads(Path(sys.argv[1]).read_text()))
