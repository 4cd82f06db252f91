"""Helpers of all benchmark parts: arguments, clocks, ranks, host memory, page cache, reports."""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from machine import describe_machine

from xditd.client.output_files import write_file

GIB = 2**30
SAMPLE_EVERY_S = 0.02
SKIPPED = 77
"""Exit status of a part that cannot run here, as in Automake's test drivers."""
MOST_LEFT = 0.02
RUN = Path(__file__).resolve().parent / "run.py"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of parts that run on GPUs, or without GPUs as a dry run."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny model and small images: a dry run")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the group sizes that a part measures one after the other."""
    parser.add_argument("--workers", "--ranks", dest="ranks", type=int, nargs="+", default=[1], metavar="N")


def need_gpus(part: str, count: int, device: str = "cuda") -> None:
    """End the part as skipped if there are fewer GPUs than it needs."""
    found = len(describe_machine()["gpus"]) if device == "cuda" else count
    if found < count:
        skip(f"{part}: needs {count} GPU(s), one for each worker, and there are {found} here")


def skip(reason: str) -> NoReturn:
    say(f"skipped: {reason}")
    sys.exit(SKIPPED)


def part_command(part: str, *arguments: object) -> list[str]:
    """Return the command that runs a part in a process of its own."""
    return [sys.executable, str(RUN), part, *map(str, arguments)]


def clean_environment(**more: str) -> dict[str, str]:
    """Return this environment without Hugging Face downloads and without settings of torch's allocator."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH")}
    return {**kept, "HF_HUB_OFFLINE": "1", **more}


# --- Clocks --------------------------------------------------------------------------------------


def synchronize(device: Any) -> None:
    """Wait for the GPU, if ``device`` is one."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def timed(do: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``do`` returns, and the milliseconds that it took on the host."""
    began_s = time.perf_counter()
    result = do()
    return result, (time.perf_counter() - began_s) * 1e3


def repeat_ms(
    action: Callable[[], object],
    repeats: int = 1,
    *,
    device: object = "cpu",
    warm_ups: int = 0,
) -> list[float]:
    """Return the milliseconds of each of ``repeats`` runs.

    Each run is timed until ``device`` is synchronized. ``warm_ups`` runs come first and do not count.
    """
    took: list[float] = []
    for number in range(warm_ups + repeats):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        if number >= warm_ups:
            took.append((time.perf_counter() - started) * 1e3)
    return took


# --- Ranks ---------------------------------------------------------------------------------------


def run_on_ranks(run_rank: Callable[..., Any], ranks: int, *arguments: Any, is_one_here: bool = False) -> list[Any]:
    """Run ``run_rank(rank, ranks, store, *arguments)`` in ``ranks`` processes; returns their results.

    ``store`` is the path of the ranks' FileStore. The processes are daemonic, so they end with this one. With
    ``is_one_here`` a single rank runs in this process, so that its start is this program's start.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="xditd-ranks-") as folder:
        if ranks == 1 and is_one_here:
            return [run_rank(0, 1, f"{folder}/store", *arguments)]
        started = torch.multiprocessing.start_processes(
            _run_rank, (run_rank, ranks, folder, arguments), nprocs=ranks, join=False, daemon=True, start_method="spawn"
        )
        while not started.join():
            pass
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _run_rank(rank: int, run_rank: Callable[..., Any], ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    found = run_rank(rank, ranks, f"{folder}/store", *arguments)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


# --- Memory of the host --------------------------------------------------------------------------


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return a process's resident anonymous memory, without mapped files. Source: proc_pid_status(5), "RssAnon"."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/status has no RssAnon: the process has ended")


class AnonymousPeak:
    """Measures the peak anonymous memory of processes during a ``with`` block, beyond what they had before."""

    def __init__(self, pids: Iterable[int | str] = ("self",)) -> None:
        self.before = {pid: anonymous_bytes(pid) for pid in pids}
        self.most = dict(self.before)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def grown_gib(self) -> list[float]:
        return [(self.most[pid] - before) / GIB for pid, before in self.before.items()]

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_EVERY_S):
            self._look()

    def _look(self) -> None:
        for pid, most in self.most.items():
            self.most[pid] = max(most, anonymous_bytes(pid))

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()


def drop_from_page_cache(path: Path) -> str | None:
    """Drop a file from the page cache; returns a reason if most of it stays there.

    Source: posix_fadvise(2), "POSIX_FADV_DONTNEED": dirty pages stay, so they are written first.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident_share(path)
    if left > MOST_LEFT:
        return f"cold file: {left:.0%} stay in memory after posix_fadvise(DONTNEED); is the file on a tmpfs?"
    return None


def resident_share(path: Path) -> float:
    """Return the share of a file's pages that are in memory. Source: mincore(2)."""
    libc, size = ctypes.CDLL(None, use_errno=True), path.stat().st_size
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    # Mapped as writable, though nothing is written: ctypes gives the address of writable memory only.
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), found)
        del first  # it keeps the mapping open
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return sum(each & 1 for each in bytes(found)) / len(found)


# --- Reports -------------------------------------------------------------------------------------


class Report:
    """Results of a part, written to a file after every addition, so that an interrupted part leaves what it has."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.found: dict[str, Any] = {}
        # The suite terminates a part that takes too long; an exception also ends its daemon and its ranks.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))

    def add(self, **found: Any) -> None:
        self.found.setdefault("machine", describe_machine())  # not in __init__, which may be part of a timed start
        self.found.update(found)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, json.dumps(self.found, indent=1).encode(), b"\n")


def print_machine(machine: dict[str, Any]) -> None:
    print(f"{', '.join(machine['gpus']) or machine['cpu']}; Python {machine['python']}")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()), flush=True)


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, each column as wide as its widest cell."""
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
