"""A safetensors file onto the GPU: what the bus can do, what safetensors does, what a worker does, side by side.

    python benchmarks/uploads.py --gib 8 --ranks 1 2

All ranks copy the whole file at the same time, each to its own GPU, from a warm page cache. ``bus`` copies one pinned
buffer again and again, which is the ceiling; ``safetensors`` is ``load_file(path, device=...)``; ``xditd`` is what
workers do, first with its buffers still to be made, then with them. Prints GB/s of the slowest rank, the ratio to
the ceiling, and by how much the anonymous memory of a rank grew meanwhile; ``--json FILE`` writes all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from xditd.client.output_files import write_file

MIB = 2**20
PINNED_BYTES = 256 * MIB
TENSOR_BYTES = 64 * MIB
WAYS = ("bus", "safetensors", "xditd first", "xditd")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=int, default=8, help="size of the file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the file is written (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    return parser


def write_random(path: Path, gib: int) -> int:
    """Write a safetensors file of uint8 tensors with random content; return where its data starts."""
    count = gib * 2**30 // TENSOR_BYTES
    header = {
        f"t{number:04d}": {
            "dtype": "U8",
            "shape": [TENSOR_BYTES],
            "data_offsets": [number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES],
        }
        for number in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = os.urandom(TENSOR_BYTES - 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number in range(count):
            file.write(struct.pack("<Q", number) + noise)
    return 8 + len(text)


class AnonymousMemory(contextlib.AbstractContextManager["AnonymousMemory"]):
    """How far this process's anonymous memory rises above what it was at the start, in bytes."""

    def __enter__(self) -> AnonymousMemory:
        self._before = self._now()
        self.growth_bytes = 0
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            self.growth_bytes = max(self.growth_bytes, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Meter:
    """Times copies of one rank, all ranks at once."""

    def __init__(self, barrier: Any) -> None:
        self.found: dict[str, Any] = {}
        self._barrier = barrier

    def measure(self, way: str, repeats: int, copy: Callable[[], object]) -> None:
        seconds = []
        with AnonymousMemory() as memory:
            for _ in range(repeats):
                torch.cuda.synchronize()
                self._barrier.wait()
                started = time.perf_counter()
                copied = copy()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
                del copied
        self.found[way] = {"s": seconds, "anonymous_growth_bytes": memory.growth_bytes}


def run_rank(rank: int, given: argparse.Namespace, path: Path, start: int, barrier: Any, folder: str) -> None:
    from safetensors.torch import load_file

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.set_num_threads(1)  # as ranks do
    meter = Meter(barrier)
    measure_uploads(meter, given.repeats, path, start, device)
    torch.cuda.empty_cache()  # room for the file's second copy
    meter.measure("safetensors", 1, lambda: load_file(path, device=str(device)))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(meter.found))


def measure_uploads(meter: Meter, repeats: int, path: Path, start: int, device: torch.device) -> None:
    from xditd.ipc.transports.uploads import FileStretch, upload

    size = path.stat().st_size - start
    target = torch.empty(size, dtype=torch.uint8, device=device)
    pinned = torch.zeros(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)

    def fill_from_pinned() -> None:
        for part in target.split(PINNED_BYTES):
            part.copy_(pinned[: part.numel()], non_blocking=True)

    def upload_file() -> None:
        with path.open("rb") as file:
            deque(upload([(FileStretch(file.fileno(), start, size, str(path)), target)]), maxlen=0)

    meter.measure("bus", repeats, fill_from_pinned)
    meter.measure("xditd first", 1, upload_file)
    meter.measure("xditd", repeats, upload_file)
    with path.open("rb") as file:  # right bytes, or the figures mean nothing
        for at in range(0, size, TENSOR_BYTES):
            expected = torch.frombuffer(bytearray(os.pread(file.fileno(), 4096, start + at)), dtype=torch.uint8)
            if not torch.equal(target[at : at + 4096].cpu(), expected):
                raise SystemExit(f"wrong bytes at {at}")


def lines(found: list[dict[str, Any]], size: int) -> Iterator[str]:
    """One line for each way; the slowest rank counts."""
    ceiling = 0.0
    for way in WAYS:
        seconds = max(statistics.median(each[way]["s"]) for each in found)
        rate = size / seconds / 1e9
        ceiling = ceiling or rate
        growth = max(each[way]["anonymous_growth_bytes"] for each in found) / MIB
        yield f"  {way:12s} {rate:7.1f} GB/s  {rate / ceiling:.2f}x of the bus  {seconds:7.3f} s  +{growth:.0f} MiB"


def main() -> None:
    given = build_parser().parse_args()
    if torch.cuda.device_count() < max(given.ranks):
        sys.exit(f"--ranks {max(given.ranks)}: there are {torch.cuda.device_count()} GPUs here, one for each rank")
    machine = describe_machine()
    report: dict[str, Any] = {"machine": machine, "gib": given.gib, "groups": []}
    print(f"{', '.join(machine['gpus'])}; {machine['cpu']}; torch {machine['versions']['torch']}")
    with tempfile.TemporaryDirectory(prefix="xditd-uploads-", dir=given.folder) as folder:
        path = Path(folder, "weights.safetensors")
        start = write_random(path, given.gib)
        for ranks in given.ranks:
            barrier = torch.multiprocessing.get_context("spawn").Barrier(ranks)
            torch.multiprocessing.spawn(run_rank, (given, path, start, barrier, folder), nprocs=ranks)
            found = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]
            report["groups"].append({"ranks": ranks, "by_rank": found})
            print(f"\n{ranks} rank(s), {given.gib} GiB each")
            for line in lines(found, path.stat().st_size - start):
                print(line)
    if given.json:
        write_file(given.json, json.dumps(report, indent=1).encode(), b"\n")


if __name__ == "__main__":
    main()
