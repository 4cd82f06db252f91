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


class Kernel(NamedTuple):
    name: str
    begins_us: float
    ends_us: float


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

    ``gaps`` is the share of that time in which nothing ran on the GPU.
    """
    kernels = sorted(calls, key=lambda call: call[-1].ends_us - call[0].begins_us)[len(calls) // 2]
    busy_us, free_from = 0.0, kernels[0].begins_us
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        busy_us += max(0.0, kernel.ends_us - max(free_from, kernel.begins_us))
        free_from = max(free_from, kernel.ends_us)
        took_ms = (kernel.ends_us - kernel.begins_us) / 1e3
        kinds[kind_of(kernel.name)] += took_ms
        names[kernel.name[:90]][0] += took_ms
        names[kernel.name[:90]][1] += 1
    length_us = free_from - kernels[0].begins_us
    longest = sorted(((round(took, 2), int(count), name) for name, (took, count) in names.items()), reverse=True)
    return {
        "kernels": len(kernels),
        "length_ms": round(length_us / 1e3, 2),
        "gaps": round(1 - busy_us / length_us, 4),
        "kinds_ms": {kind: round(took, 2) for kind, took in sorted(kinds.items())},
        "top": longest[:top],
    }


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, marks in KINDS if any(mark in lower for mark in marks)), "the rest")
