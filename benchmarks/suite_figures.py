"""Read the suite's report: one method for each figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from measuring import GIB

LONGEST_REASON = 100
"""Longer reasons are cut in the table; the whole reason is in the JSON and after the tables."""


class Missing(Exception):
    """A figure is not in the report; the message says why."""


@dataclass(frozen=True)
class Figure:
    """All runs of one measurement, and their median."""

    runs: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def __str__(self) -> str:
        digits = 0 if abs(self.median) >= 100 else 1 if abs(self.median) >= 10 else 2
        if self.unit == "ms" and self.median >= 10_000:
            return str(Figure(tuple(run / 1e3 for run in self.runs), "s"))
        if self.unit == "":
            return f"{self.median:.1e}" if 0 < abs(self.median) < 0.01 else f"{self.median:.3f}"
        text = f"{self.median:.{digits}f} {self.unit}"
        if len(self.runs) == 1:
            return text
        return f"{text} ({min(self.runs):.{digits}f}-{max(self.runs):.{digits}f}, n {len(self.runs)})"


class SuiteReport:
    """Figures of one run of the suite. Every method raises :class:`Missing` if the report lacks the figure."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.machine: dict[str, Any] = report["machine"]
        self.made: dict[str, Any] = report["made"]
        self.parts: dict[str, dict[str, Any]] = report["parts"]

    @property
    def groups(self) -> list[int]:
        """Sizes of the measured groups, the largest first."""
        numbers = {int(name.rpartition("-")[2]) for name in self.parts if name.startswith(("workers-", "plain-"))}
        return sorted(numbers, reverse=True)

    def group_line(self, workers: int) -> str:
        """Describe a group's layout and attention."""
        part = f"workers-{workers}"
        degrees = ", ".join(f"{name} {degree}" for name, degree in self.look(part, "parallel").items())
        return f"{workers} worker(s): {degrees}; attention {self.look(part, 'attention')}"

    def look(self, part: str, *path: str) -> Any:
        if part not in self.parts:
            raise Missing(f"{part} was not asked for")
        found: Any = self.parts[part]
        for key in path:
            if not isinstance(found, dict) or key not in found:
                raise Missing(self._why(part, path))
            found = found[key]
        return found

    def _why(self, part: str, path: tuple[str, ...]) -> str:
        whole = self.parts[part]
        stages, refused = whole.get("failed_stages", {}), whole.get(path[0])
        if isinstance(refused, dict) and path[-1] == "cold" and "cold_refused" in refused:
            return str(refused["cold_refused"])
        if path[-1] == "through_arena" and not self.machine["gpus"]:
            return "no GPU"
        renamed = {"relend_ms": "lends", "latents": "jobs", "image": "jobs", "denoise": "calls"}
        reason = stages.get(path[0]) or stages.get(renamed.get(path[0], ""))
        reason = reason or whole.get("failed") or whole.get("cold_refused")
        text = f"{part}: {reason or 'not measured: ' + '.'.join(path)}".splitlines()[0]
        return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."

    # --- Through the daemon ----------------------------------------------------------------------

    def lend(self, workers: int) -> Figure:
        return ms(each["total_ms"] for each in self.look(f"workers-{workers}", "lends"))

    def lend_phases(self, workers: int) -> dict[str, float]:
        """Milliseconds of the median lend by phase."""
        lends = sorted(self.look(f"workers-{workers}", "lends"), key=lambda each: each["total_ms"])
        found = dict(lends[len(lends) // 2]["phases_ms"])
        total = found.pop("total")
        found.pop("lend", None)  # the daemon's time of all the workers' phases together
        return {**found, "messages and the rest": total - sum(found.values())}

    def copied_gib(self, workers: int) -> Figure:
        """GiB that a lend copies, of all kinds, in the client and all workers."""
        lends = self.look(f"workers-{workers}", "lends")
        return Figure((max(sum(each["copied_bytes"].values()) for each in lends) / GIB,), "GiB")

    def peer_gb_s(self, workers: int) -> Figure:
        """Bytes a second of the copies to other GPUs, of the slowest rank."""
        found = []
        for each in self.look(f"workers-{workers}", "lends"):
            if not each["phases_ms"].get("peer_copy") or not each["copied_bytes"]["peer"]:
                raise Missing("no peer copies: ranks share the memory")
            found.append(each["copied_bytes"]["peer"] / (workers - 1) / each["phases_ms"]["peer_copy"] / 1e6)
        return Figure(tuple(found), "GB/s")

    def relend(self, workers: int) -> Figure:
        return ms(self.look(f"workers-{workers}", "relend_ms"))

    def step(self, part: str) -> Figure:
        steps = self.made["steps"]
        return ms(each["steps"] / steps for each in self.look(part, "latents", "workers_ms"))

    def job(self, part: str, what: str = "latents") -> Figure:
        return ms(self.look(part, what, "client_ms"))

    def decode(self, part: str) -> Figure:
        return ms(each["decode"] for each in self.look(part, "image", "workers_ms"))

    def call(self, part: str, how: str = "kept_ms") -> Figure:
        """One forward from a client; its key in reports is ``denoise``."""
        return ms(self.look(part, "denoise", how))

    def swap(self, workers: int) -> Figure:
        """Ratio of the first step after a change of the model to a later one."""
        found = self.look(f"workers-{workers}", "swap")
        steady = statistics.median(found["steady_workers_ms"])
        return Figure(tuple(first / steady for first in found["first_workers_ms"]), "x")

    def built_by_swaps(self, workers: int) -> Figure:
        return Figure((self.look(f"workers-{workers}", "swap")["models_built"],), "models")

    def cold_client(self, workers: int) -> Figure:
        """Time from ``lend`` to a first image, minus the steps at their median time."""
        step = self.step(f"workers-{workers}").median
        return ms(
            each["lend_ms"] + each["lend_vae_ms"] + each["image_ms"] - each["steps"] * step
            for each in self.look(f"workers-{workers}", "cold_clients")
        )

    def start_phases(self, workers: int) -> dict[str, float]:
        """Seconds from starting the daemon to a first image, by phase."""
        part = f"workers-{workers}"
        seconds = self.look(part, "start_s")
        lends_ms = self.look(part, "first_lend", "total_ms") + self.look(part, "first_vae_lend", "total_ms")
        image = self.look(part, "first_image_workers_ms")
        decode_s = image.get("decode", 0.0) / 1e3
        return {
            "start and imports": seconds["workers_ready"],
            "lend": lends_ms / 1e3,
            "steps": self.look(part, "first_image_ms") / 1e3 - decode_s,
            "decode": decode_s,
        }

    def start(self, workers: int) -> Figure:
        return Figure((sum(self.start_phases(workers).values()),), "s")

    def cold_phases(self, workers: int) -> dict[str, float]:
        """Seconds from ``lend`` of a cold client to an image with as many steps as the rivals make."""
        every = self.look(f"workers-{workers}", "cold_clients")
        each = sorted(every, key=lambda one: one["lend_ms"] + one["image_ms"])[len(every) // 2]
        step_ms, decode_ms = self.step(f"workers-{workers}").median, each["timings_ms"]["decode"]
        beyond_ms = each["image_ms"] - each["steps"] * step_ms - decode_ms
        return {
            "lend": (each["lend_ms"] + each["lend_vae_ms"]) / 1e3,
            "steps": (beyond_ms + self.made["steps"] * step_ms) / 1e3,
            "decode": decode_ms / 1e3,
        }

    def lend_file(self, workers: int, how: str = "warm") -> Figure:
        found = self.look(f"workers-{workers}", "files", how)
        return ms(each["total_ms"] for each in (found if isinstance(found, list) else [found]))

    def file_gb_s(self, workers: int) -> Figure:
        """Bytes a second that reach all GPUs together when a warm file is lent."""
        size = self.made["bytes"] * workers
        return Figure(tuple(size / took_ms / 1e6 for took_ms in self.lend_file(workers).runs), "GB/s")

    def host_gib(self, workers: int) -> Figure:
        """Largest growth of any rank's anonymous host memory while a file was lent."""
        lends = self.look(f"workers-{workers}", "files", "warm")
        return Figure((max(max(each["anonymous_gib"]) for each in lends),), "GiB")

    def memory_gib(self, workers: int, when: str) -> Figure:
        """GPU memory of all workers beyond their copies of the weights."""
        if not self.machine["gpus"]:
            raise Missing("no GPU")
        part = f"workers-{workers}"
        used, lent = (self.look(part, "memory", when, which) for which in ("workers_gib", "lent_gib"))
        return Figure((used - (workers - 1) * lent,), "GiB")

    def client_gib(self, workers: int) -> Figure:
        if not self.machine["gpus"]:
            raise Missing("no GPU")
        return Figure((self.look(f"workers-{workers}", "memory", "ran")["client_beyond_weights_gib"],), "GiB")

    def parity(self, part: str, rival: str = "diffusers_1") -> Figure:
        errors = self.look(part, "parity")
        if rival not in errors:
            raise Missing(f"no latents of {rival}: it did not run on these files")
        return Figure((errors[rival],), "")

    def differing_bits(self, part: str) -> Figure:
        return Figure((0.0 if self.look(part, "same_bits_again") else 1.0,), "")

    # --- Rivals and the machine ------------------------------------------------------------------

    def rival_step(self, part: str) -> Figure:
        return ms(took_s * 1e3 / self.made["steps"] for took_s in self.look(part, "job_s"))

    def rival_job(self, part: str) -> Figure:
        return ms(took_s * 1e3 for took_s in self.look(part, "job_s"))

    def rival_image(self, part: str) -> Figure:
        runs = zip(self.look(part, "job_s"), self.look(part, "decode_s"), strict=True)
        return ms(sum(run) * 1e3 for run in runs)

    def rival_decode(self, part: str) -> Figure:
        return ms(took_s * 1e3 for took_s in self.look(part, "decode_s"))

    def rival_phases(self, part: str) -> dict[str, float]:
        """Seconds from starting the program to a first image, by phase."""
        look = self.look
        return {
            "start and imports": look(part, "started_s"),
            "load": look(part, "load_s") + look(part, "load_vae_s"),
            "steps": look(part, "first_job_s"),
            "decode": look(part, "first_decode_s"),
        }

    def load(self, part: str, how: str = "warm_ms") -> Figure:
        found = self.look(part, how)
        return ms(found if isinstance(found, list) else [found])

    def tensor_ipc(self, what: str = "whole_ms") -> Figure:
        return ms(self.look("tensor-ipc", what))

    def ceiling(self, name: str) -> Figure:
        return Figure((self.look("ceilings", name),), "GB/s")

    def floor_ms(self, workers: int) -> float:
        """Least time of a step: its matrix products at an H200's rate."""
        if not any("H200" in gpu for gpu in self.machine["gpus"]):
            raise Missing("the floor is known for H200s only")
        return float(self.made["floor_ms"]) / workers


def ms(runs: Iterable[float]) -> Figure:
    return Figure(tuple(runs), "ms")


def reason_of(ask: Callable[[], object]) -> str | None:
    """Return why a figure is missing, or ``None`` if it is there."""
    try:
        ask()
    except Missing as missing:
        return str(missing)
    return None
