"""Record the kernels of the workers' GPUs while calls run, and sum them up: time by kind, and the gaps between them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

KINDS = (
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "_multiply_vectors", "gemv")),
    ("attention", ("sdpa", "flash", "fmha", "cudnn_generated")),
    ("communication", ("nccl", "_barrier", "_send_")),
)
APART_S = 0.1
"""Between calls, so that kernels of one are told from those of the next."""
MOST_WAIT_S = 60.0
GAP_LIMITS_US = (2.0, 10.0)
"""Between the sizes of gaps that are counted apart: two kernels of one graph are about 1 us apart."""
LARGEST_GAPS = 3


class Kernel(NamedTuple):
    name: str
    begins_us: float
    ends_us: float


class Gap(NamedTuple):
    """A time in which nothing ran on the GPU, with the names of the kernels before and after it."""

    length_us: float
    before: str
    after: str


class KernelRecorder:
    """Records kernels of processes that are started with :attr:`python_path` first in their ``PYTHONPATH``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(Path(__file__).with_name("recorded_process.py"), folder / "sitecustomize.py")

    @contextmanager
    def in_path(self) -> Iterator[None]:
        """Let processes that are started meanwhile be recorded."""
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(self.folder), *([before] if before else [])])
        try:
            yield
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before

    def record(self, pids: set[int], call: Callable[[], object], calls: int) -> dict[int, list[list[Kernel]]]:
        """Return the kernels of each call, by process."""
        flag = self.folder / "record"
        flag.touch()
        self._wait_for(pids, "ready")
        for _ in range(calls):
            time.sleep(APART_S)
            call()
        time.sleep(APART_S)
        flag.unlink()
        self._wait_for(pids, "json")
        found = {pid: by_call(read_kernels(self.folder / f"{pid}.json")) for pid in pids}
        for pid in pids:
            (self.folder / f"{pid}.json").unlink()
        return found

    def _wait_for(self, pids: set[int], suffix: str) -> None:
        began = time.monotonic()
        while not all((self.folder / f"{pid}.{suffix}").exists() for pid in pids):
            if time.monotonic() - began > MOST_WAIT_S:
                raise TimeoutError(f"no {suffix} file of processes {sorted(pids)} in {self.folder}")
            time.sleep(0.02)


def read_kernels(trace: Path) -> list[Kernel]:
    """Return what ran on a GPU, from a Chrome trace, in the order of its begin."""
    found = [
        Kernel(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda kernel: kernel.begins_us)


def by_call(kernels: list[Kernel]) -> list[list[Kernel]]:
    calls: list[list[Kernel]] = []
    for kernel in kernels:
        if not calls or kernel.begins_us - calls[-1][-1].ends_us > APART_S / 2 * 1e6:
            calls.append([])
        calls[-1].append(kernel)
    return calls


def summarise(calls: list[list[Kernel]], top: int = 12) -> dict[str, Any]:
    """Sum up the call in the middle by its length: from its first kernel to the end of the last one.

    ``gaps`` is the share of that time in which nothing ran on the GPU. ``gaps_of`` has their milliseconds and number by
    length, and ``largest_gaps`` those that took longest, in us, with the kernels before and after.
    """
    kernels = sorted(calls, key=lambda call: call[-1].ends_us - call[0].begins_us)[len(calls) // 2]
    gaps = gaps_between(kernels)
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        took_ms = (kernel.ends_us - kernel.begins_us) / 1e3
        kinds[kind_of(kernel.name)] += took_ms
        names[kernel.name[:90]][0] += took_ms
        names[kernel.name[:90]][1] += 1
    length_us = max(kernel.ends_us for kernel in kernels) - kernels[0].begins_us
    longest = sorted(((round(took, 2), int(count), name) for name, (took, count) in names.items()), reverse=True)
    return {
        "kernels": len(kernels),
        "length_ms": round(length_us / 1e3, 2),
        "gaps": round(sum(gap.length_us for gap in gaps) / length_us, 4),
        "gaps_of": gaps_by_length(gaps),
        "largest_gaps": [
            (round(gap.length_us, 1), gap.before[:90], gap.after[:90])
            for gap in sorted(gaps, key=lambda gap: gap.length_us, reverse=True)[:LARGEST_GAPS]
        ],
        "kinds_ms": {kind: round(took, 2) for kind, took in sorted(kinds.items())},
        "top": longest[:top],
    }


def gaps_between(kernels: list[Kernel]) -> list[Gap]:
    """Return the gaps between kernels that are in the order of their begin."""
    found, last = [], kernels[0]  # the kernel that ends last of those so far
    for kernel in kernels[1:]:
        if kernel.begins_us > last.ends_us:
            found.append(Gap(kernel.begins_us - last.ends_us, last.name, kernel.name))
        if kernel.ends_us > last.ends_us:
            last = kernel
    return found


def gaps_by_length(gaps: list[Gap]) -> dict[str, dict[str, float]]:
    short_us, long_us = GAP_LIMITS_US
    limits = {
        f"below {short_us:g} us": (0.0, short_us),
        f"{short_us:g} to {long_us:g} us": (short_us, long_us),
        f"above {long_us:g} us": (long_us, float("inf")),
    }
    lengths = {
        name: [gap.length_us for gap in gaps if least <= gap.length_us < most] for name, (least, most) in limits.items()
    }
    return {name: {"ms": round(sum(each) / 1e3, 3), "count": len(each)} for name, each in lengths.items()}


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, marks in KINDS if any(mark in lower for mark in marks)), "the rest")
