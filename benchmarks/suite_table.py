"""Print the suite's tables: each figure, its limit, and the program that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from measuring import GIB, print_machine, print_table
from suite_figures import Figure, Missing, SuiteReport, reason_of

Ask = Callable[[], Figure]
Bar = Callable[[str], str]


@dataclass(frozen=True)
class Row:
    """One line. ``bar`` is a limit such as ``<= 25``; one that ends in x is for the ratio to ``rival``."""

    what: str
    ask: Ask
    bar: str = ""
    beside: str = ""
    rival: Ask | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """Return name, figure, limit and comparison; the last has the reason if a figure is missing."""
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
        is_of_ratio = self.rival is not None and self.bar.endswith("x")
        return self.what, str(found), self._judge(ratio if is_of_ratio else found.median, found.unit), beside

    def _judge(self, judged: float | None, unit: str) -> str:
        if not self.bar:
            return ""
        bar = self.bar if self.bar.endswith("x") else f"{self.bar} {unit}".rstrip()
        if judged is None:
            return f"{bar}: ?"
        limit = float(self.bar[2:].rstrip("x"))
        is_met = judged >= limit if self.bar.startswith(">=") else judged <= limit
        return f"{bar}: {'met' if is_met else 'MISSED'}"


def print_tables(raw: dict[str, Any]) -> None:
    report = SuiteReport(raw)
    made, groups = report.made, report.groups
    print()
    print_machine(report.machine)
    print(
        f"{made['parameters'] / 1e9:.3g} B parameters, {made['bytes'] / GIB:.3g} GiB {made['dtype']}, random; "
        f"{made['pixels']} pixels, {made['tokens']} text tokens, {made['steps']} steps. Medians (least-most, runs)."
    )
    for workers in groups:
        if reason_of(partial(report.group_line, workers)) is None:
            print(report.group_line(workers))

    def full(bar: str) -> str:
        """Return the limit for full size on two H200, and none for other sizes."""
        return bar if made["parameters"] > 10**10 else ""

    for title, rows in (
        ("Lending", [row for workers in groups for row in lending(report, workers, full)]),
        ("Files", [row for workers in groups for row in files(report, workers, full)] + loads(report)),
        ("Jobs, lossless", [row for workers in groups for row in jobs(report, workers, full)]),
        ("Layouts on two workers, lossless", layouts(report)),
        ("Memory of GPUs", [row for workers in groups for row in memory(report, workers)]),
        ("Precision traded for speed: NOT lossless", [row for workers in groups for row in lossy(report, workers)]),
    ):
        if rows:
            print_table(title, [row.cells() for row in rows])
    print_phases(report)
    failed = [(name, part["failed"]) for name, part in report.parts.items() if "failed" in part]
    if failed:
        print_table("Stages that failed", failed)


def lending(report: SuiteReport, workers: int, full: Bar) -> list[Row]:
    label, ipc = on(workers), ("torch IPC tensor by tensor, one process", report.tensor_ipc)
    ceiling = ("one copy in one piece", partial(report.ceiling, "peer_gb_s"))
    peer = Row(f"  copy to each other GPU{label}", partial(report.peer_gb_s, workers), full(">= 0.9x"), *ceiling)
    lend, cold = partial(report.lend, workers), partial(report.cold_client, workers)
    return [
        Row(f"lend, model built{label}", lend, full("<= 25" if workers == 1 else "<= 100"), *ipc),
        Row(f"  lend again what is lent{label}", partial(report.relend, workers)),
        Row(f"  bytes copied{label}", partial(report.copied_gib, workers)),
        *([peer] if workers > 1 else []),
        Row(f"swap: first step against a steady one{label}", partial(report.swap, workers), full("<= 1.2x")),
        Row(f"  built by swaps{label}", partial(report.built_by_swaps, workers), "<= 0"),
        Row(f"cold client: lend to image beyond steps{label}", cold, full("<= 500")),
        Row(f"daemon start to a first image{label}", partial(report.start, workers), full("<= 30")),
    ]


def files(report: SuiteReport, workers: int, full: Bar) -> list[Row]:
    label, lend = on(workers), partial(report.lend_file, workers)
    pretrained = partial(report.load, "load-pretrained")
    ceiling = partial(report.ceiling, "upload_0_gb_s" if workers == 1 else "upload_all_gb_s")
    pinned = ("pinned memory to as many GPUs", ceiling)
    own = full(f"<= {report.made['bytes'] / GIB / 4:g}")
    return [
        Row(f"lend a warm file{label}", lend, "", "from_pretrained to one device", pretrained),
        Row(f"  bytes to all GPUs{label}", partial(report.file_gb_s, workers), full(">= 0.8x"), *pinned),
        Row(f"  through an arena of the client{label}", partial(lend, "through_arena")),
        Row(
            f"lend a cold file{label}",
            partial(lend, "cold"),
            "",
            "from_pretrained, cold",
            partial(pretrained, "cold_ms"),
        ),
        Row(f"own host memory of the largest rank{label}", partial(report.host_gib, workers), own),
    ]


def loads(report: SuiteReport) -> list[Row]:
    rows = []
    for part in ("load-safetensors", "load-single-file", "load-pretrained"):
        if part in report.parts:
            rows.append(Row(f"{part}, warm, one process", partial(report.load, part)))
            if reason_of(partial(report.load, part)) is None:
                rows.append(Row("  cold", partial(report.load, part, "cold_ms")))
    return rows


def jobs(report: SuiteReport, workers: int, full: Bar) -> list[Row]:
    label, part, same = on(workers), f"workers-{workers}", f"xfuser-{workers}"
    step, rival_step = partial(report.step, part), partial(report.rival_step, same)
    rows = [
        Row(f"step of generate{label}", step, full("<= 1.01x"), same, rival_step),
        Row("", step, "", "diffusers", partial(report.rival_step, "diffusers")),
    ]
    if workers > 1:
        context = f"context-parallel-{workers}"
        rows.append(Row("", step, "", context, partial(report.rival_step, context)))
    if reason_of(partial(report.floor_ms, workers)) is None:
        floor = Figure((report.floor_ms(workers),), "ms")
        rows.append(Row("", step, "", "the floor", lambda: floor))
    plain, whole, image = (
        partial(report.step, f"plain-{workers}"),
        partial(report.job, part),
        partial(report.job, part, "image"),
    )
    whole_bar, image_bar = (full("<= 3300"), "") if workers == 1 else (full("<= 2000"), full("<= 2100"))
    call, generate = partial(report.call, part), ("a step of generate", step)
    return [
        *rows,
        Row(f"all steps to latents{label}", whole, whole_bar, same, partial(report.rival_job, same)),
        Row(f"image{label}", image, image_bar, same, partial(report.rival_image, same)),
        Row(f"  decode{label}", partial(report.decode, part), "", same, partial(report.rival_decode, same)),
        Row(f"plain kernels: step{label}", plain, full("<= 1.01x"), same, rival_step),
        Row(f"call from the client{label}", call, full("<= 1.02x"), *generate),
        Row(f"  sigmas not told before{label}", partial(call, "unforeseen_ms"), "", *generate),
        Row(f"  conditioning sent each time{label}", partial(call, "sent_ms"), "", *generate),
        *errors(report, part, f"error after {report.made['parity_steps']} steps{label}"),
        Row(f"  plain kernels{label}", partial(report.parity, f"plain-{workers}"), "<= 0.01"),
    ]


def errors(report: SuiteReport, part: str, what: str = "  error", bar: str = "<= 0.01") -> list[Row]:
    bits = partial(report.differing_bits, part)
    return [Row(what, partial(report.parity, part), bar), Row("  differing bits in a second run", bits, bar and "<= 0")]


def layouts(report: SuiteReport) -> list[Row]:
    rows = []
    ulysses = "workers-2"
    for part in [ulysses, *sorted(name for name in report.parts if name.startswith("layout-"))]:
        if part not in report.parts:
            continue
        asked = {
            f"{'ulysses=2' if part == ulysses else part.removeprefix('layout-')}: step of generate": report.step,
            "  call": report.call,
            "  call, two rows": partial(report.call, how="two_rows_ms"),
        }
        for what, ask in asked.items() if reason_of(partial(report.step, part)) is None else [*asked.items()][:1]:
            beside = () if part == ulysses else ("ulysses=2", partial(ask, ulysses))
            rows.append(Row(what, partial(ask, part), "", *beside))
        if reason_of(partial(report.step, part)) is None:
            rows += errors(report, part)
    return rows


def memory(report: SuiteReport, workers: int) -> list[Row]:
    label = on(workers)
    return [
        Row(f"workers beyond weights, ready{label}", partial(report.memory_gib, workers, "workers_ready")),
        Row(f"workers beyond weights, after jobs{label}", partial(report.memory_gib, workers, "ran")),
        Row(f"client beyond weights{label}", partial(report.client_gib, workers)),
    ]


def lossy(report: SuiteReport, workers: int) -> list[Row]:
    rows, lossless = [], partial(report.step, f"workers-{workers}")
    for mode in ("fp8", "step-cache"):
        part = f"{mode}-{workers}"
        if part in report.parts:
            step = partial(report.step, part)
            rows.append(Row(f"{mode}: step of generate{on(workers)}", step, "", "lossless", lossless))
            rows += errors(report, part, bar="") if reason_of(step) is None else []
    return rows


def on(workers: int) -> str:
    return f", {workers} worker{'s' if workers > 1 else ''}"


def print_phases(report: SuiteReport) -> None:
    """Print the phases of a lend in milliseconds, and of the time to a first image in seconds."""
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
