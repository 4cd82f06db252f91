"""Compare the upload of a warm file to GPUs with copies from pinned memory, in one run.

    python benchmarks/run.py uploads --workers 1 2 --json FILE
    python benchmarks/run.py uploads --device cpu --small --workers 1 2

A FLUX.1 file of ``--gib`` is written once and stays in the page cache. First the uploader alone, in this process, with
each number of threads and size of pieces, also for as many bytes in many small ranges. Then one daemon for each number
of workers lends the file, as one and in shards; its rate is that of the phase in which workers copy. The same weights
follow in ``--formats``, packed as ComfyUI's files are, or in GGUF: their rate is of their own, fewer bytes.

A GPU clears memory that was freed, and all copies are slower meanwhile. So lends are ``--rest-s`` after the return of
the last one; the rate of pinned memory is printed for memory that was freed at once before, too. Without a GPU the
uploader's reads are compared with copies of memory by the same threads; lends then copy only what is not
aligned in the file.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import flux
import torch
from machine import temporary_folder
from measuring import GIB, Report, add_device, add_ranks, need_gpus, print_table, say
from parts.files import write_in_place
from parts.packed_steps import FORMATS, pack

from xditd.client import Client
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.transports.upload_pieces import FileStretch
from xditd.ipc.transports.uploads import Tuning, read_into, upload

MIB: Final = 2**20
BAR: Final = 0.9
SMALL_RANGE: Final = 96 * 1024
SHARDS: Final = 4
PHASES: Final = ("copy", "peer_copy")
PLAIN: Final = FORMATS[0]
PACKED: Final = ("int8", "q8_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_ranks(parser)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the file, about")
    parser.add_argument("--threads", type=int, nargs="+", default=[6, 10, 12, 14])
    parser.add_argument("--piece-mib", type=float, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rest-s", type=float, default=0.3, help="from the return of a loan to the next lend")
    parser.add_argument("--formats", nargs="*", default=PACKED, choices=FORMATS[1:], help="of lends, beside bfloat16")
    parser.add_argument("--folder", type=Path, help="for the file; by default in memory, if there is room for it")


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("uploads", max(given.ranks), given.device)
    # Blocks of two kinds, as many as fit: 226 MiB and 108 MiB in bfloat16.
    size = flux.SMALL.size if given.small else flux.Size(3072, round(given.gib * 1.5), round(given.gib * 3))
    shapes = flux.shapes(size, flux.dtype_on(given.device))
    wanted = sum(torch.Size(shape).numel() * kind.itemsize for kind, shape in shapes.values())
    parent = given.folder or temporary_folder((2 + len(given.formats)) * wanted)
    with tempfile.TemporaryDirectory(prefix="xditd-uploads-", dir=parent) as folder:
        say(f"  writing {wanted / GIB:.1f} GiB")
        one, shards = _write(Path(folder), size, given)
        table, pinned_rate = _measure_uploader(one, given)
        freed_rate = _pinned_into_freed(wanted, given) if given.device == "cuda" else None
        report.add(bytes=wanted, pinned_gib_s=pinned_rate, pinned_into_freed_gib_s=freed_rate, uploader=table)
        _show_uploader(table, pinned_rate, freed_rate, given.device)
        compute_dtype = _name_of(flux.dtype_on(given.device))
        files = [_Lent(f"{PLAIN}, one file", one, wanted), _Lent(f"{PLAIN}, {SHARDS} shards", shards, wanted)]
        for name in given.formats:
            path = _write_packed(one.parent, name, size, given)
            files.append(_Lent(f"{name}, one file", path, path.stat().st_size, compute_dtype))
        lends: dict[str, dict[str, Any]] = {}
        for workers in given.ranks:
            for way, found in _measure_lends(files, workers, given, Path(folder, "daemon.log")):
                lends[f"{way}, {workers} workers"] = found
                report.add(lends=lends)
    _show_lends(lends, pinned_rate, is_upload=given.device == "cuda")


class _Lent(NamedTuple):
    """A file that is lent."""

    way: str
    path: Path
    size_bytes: int
    compute_dtype: str | None = None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_packed(folder: Path, name: str, size: flux.Size, given: argparse.Namespace) -> Path:
    """Write the same weights, packed."""
    say(f"  writing {name}")
    weights = flux.state_dict(size, flux.dtype_on(given.device), flux.device_of(given), 0)
    packed = pack(weights, name, folder)
    if isinstance(packed, Path):
        return packed
    path = folder / f"flux-{name}.safetensors"
    write_in_place(packed, path)
    return path


def _write(folder: Path, size: flux.Size, given: argparse.Namespace) -> tuple[Path, Path]:
    """Write the tensors as one file, and as shards with their index."""
    weights = flux.state_dict(size, flux.dtype_on(given.device), flux.device_of(given), 0)
    one = folder / "flux.safetensors"
    write_in_place(weights, one)
    names = list(weights)
    places: dict[str, str] = {}
    for number in range(SHARDS):
        part = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        path = folder / f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        write_in_place({name: weights[name] for name in part}, path)
        places |= dict.fromkeys(part, path.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return one, index


def _measure_uploader(path: Path, given: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """Return a row for each tuning with GiB/s, and the rate of copies from pinned memory between them."""
    fd = os.open(path, os.O_RDONLY)
    size_bytes = path.stat().st_size // (64 * MIB) * (64 * MIB) or path.stat().st_size
    whole = FileStretch(fd, 0, size_bytes, str(path))
    many = [
        FileStretch(fd, at, SMALL_RANGE, str(path)) for at in range(0, min(size_bytes, GIB) - SMALL_RANGE, SMALL_RANGE)
    ]
    rows: list[dict[str, Any]] = []
    pinned: list[float] = []
    target = torch.empty(size_bytes, dtype=torch.uint8, device=flux.device_of(given))
    try:
        for threads in given.threads:
            for mib in given.piece_mib:
                tuning = Tuning(threads, round(mib * MIB))
                pinned.append(_best(lambda: _copy_pinned(target), given.repeats, size_bytes))
                for what, sources in (("one range", [whole]), ("small ranges", many)):
                    moved = sum(each.nbytes for each in sources)
                    rate = _best(lambda s=sources, t=tuning: _upload(s, target, t), given.repeats, moved)  # type: ignore[misc]
                    rows.append({"what": what, "threads": threads, "piece_mib": mib, "gib_s": rate})
    finally:
        os.close(fd)
    return rows, statistics.median(pinned)


def _pinned_into_freed(size_bytes: int, given: argparse.Namespace) -> float:
    """Return the rate of copies from pinned memory into memory that was freed at once before."""
    device = flux.device_of(given)

    def copy() -> None:
        torch.cuda.empty_cache()
        _copy_pinned(torch.empty(size_bytes, dtype=torch.uint8, device=device))

    return _best(copy, given.repeats, size_bytes)


def _best(do: Callable[[], None], repeats: int, moved_bytes: int) -> float:
    do()
    took = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        do()
        took.append(time.perf_counter() - began_s)
    return moved_bytes / GIB / min(took)


def _copy_pinned(target: torch.Tensor) -> None:
    if not target.is_cuda:
        _read_by_threads([(None, target.numel())], Tuning(len(os.sched_getaffinity(0))))
        return
    source = _pinned()
    for at in range(0, target.numel(), source.numel()):
        part = target[at : at + source.numel()]
        part.copy_(source[: part.numel()], non_blocking=True)
    torch.cuda.synchronize()


_kept: list[torch.Tensor] = []


def _pinned() -> torch.Tensor:
    if not _kept:
        _kept.append(torch.ones(512 * MIB, dtype=torch.uint8).pin_memory())
    return _kept[0]


def _upload(sources: list[FileStretch], target: torch.Tensor, tuning: Tuning) -> None:
    if not target.is_cuda:
        _read_by_threads([(each, each.nbytes) for each in sources], tuning)
        return
    ends = [0]
    for each in sources:
        ends.append(ends[-1] + each.nbytes)
    pairs = [(each, target[start : start + each.nbytes]) for each, start in zip(sources, ends, strict=False)]
    with upload(pairs, tuning) as copied:
        deque(copied, maxlen=0)
    torch.cuda.synchronize()


def _read_by_threads(sources: list[tuple[FileStretch | None, int]], tuning: Tuning) -> None:
    """Do what the uploader's threads do before the GPU copies; without a file, copy as many bytes of memory."""

    def pieces() -> Iterator[tuple[FileStretch | None, int, int]]:
        for source, nbytes in sources:
            for at in range(0, nbytes, tuning.piece_bytes):
                yield source, at, min(tuning.piece_bytes, nbytes - at)

    turns = pieces()
    memory = torch.ones(64 * MIB, dtype=torch.uint8)

    def work(_: int) -> None:
        room = mmap.mmap(-1, tuning.piece_bytes)
        view = memoryview(room)
        address = ctypes.addressof(ctypes.c_char.from_buffer(room))
        while True:
            try:
                source, at, nbytes = next(turns)
            except StopIteration:
                return
            except ValueError:  # another thread is in the generator
                continue
            if source is None:
                ctypes.memmove(address, memory.data_ptr() + at % (32 * MIB), nbytes)
            else:
                read_into(view[:nbytes], source.fd, source.offset_bytes + at, source.path)

    with ThreadPoolExecutor(min(tuning.threads, len(os.sched_getaffinity(0)))) as pool:
        deque(pool.map(work, range(tuning.threads)), maxlen=0)


def _measure_lends(
    files: Sequence[_Lent], workers: int, given: argparse.Namespace, log: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lend each file several times to one daemon; yield its size and the shortest times of all lends but the first."""
    daemon = DaemonProcess(log, workers, given.device, ["--standby", "off"])
    try:
        with daemon.connect() as client:
            for file in files:
                say(f"  lends of {file.path.name} to {workers} workers")
                client.prepare(file.path, compute_dtype=file.compute_dtype)
                daemon.wait_ready(client, lambda _: None)
                lends = [_lend(client, file, given.rest_s) for _ in range(given.repeats + 1)][1:]
                names = dict.fromkeys(name for each in lends for name in each)
                shortest = {name: min(each.get(name, 0.0) for each in lends) for name in names}
                yield file.way, {"bytes": file.size_bytes, **shortest}
    finally:
        daemon.stop(None)


def _lend(client: Client, file: _Lent, rest_s: float) -> dict[str, float]:
    time.sleep(rest_s)
    began_s = time.perf_counter()
    with client.lend(file.path, compute_dtype=file.compute_dtype) as loan:
        return {**loan.timings_ms, "whole": (time.perf_counter() - began_s) * 1e3}


def _show_uploader(rows: list[dict[str, Any]], pinned_rate: float, freed_rate: float | None, device: str) -> None:
    whats = list(dict.fromkeys(row["what"] for row in rows))
    by_tuning: dict[tuple[int, float], dict[str, float]] = {}
    for row in rows:
        by_tuning.setdefault((row["threads"], row["piece_mib"]), {})[row["what"]] = row["gib_s"] / pinned_rate
    table = [("threads", "piece MiB", *whats)]
    table += [
        (str(key[0]), f"{key[1]:g}", *(f"{found[what]:.2f}" for what in whats)) for key, found in by_tuning.items()
    ]
    base = "pinned memory" if device == "cuda" else "copies of memory"
    freed = "" if freed_rate is None else f" ({freed_rate:.1f} into memory that was just freed)"
    print_table(f"uploader: ratio to {base}, {pinned_rate:.1f} GiB/s{freed}; in use {Tuning()}", table)


def _show_lends(lends: dict[str, dict[str, Any]], pinned_rate: float, *, is_upload: bool) -> None:
    table = [("lend", "GiB", "whole ms", "copy ms", "GiB/s", "of pinned", f"bar {BAR:g}")]
    for name, found in lends.items():
        copy_ms = sum(found.get(phase, 0.0) for phase in PHASES)
        size_gib = found["bytes"] / GIB
        rate = size_gib / (copy_ms / 1e3) if copy_ms else 0.0
        ratio = rate / pinned_rate
        verdict = "-" if not copy_ms or not is_upload else "held" if ratio >= BAR else "missed"
        whole = f"{found['whole']:.0f}"
        table.append((name, f"{size_gib:.2f}", whole, f"{copy_ms:.0f}", f"{rate:.1f}", f"{ratio:.2f}", verdict))
    print_table("lends of a warm file; with several workers each uploads a share over its own link", table)
