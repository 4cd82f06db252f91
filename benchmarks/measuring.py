"""What the parts of the suite share: clocks, what a process holds on the host, and how a part reports."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from xditd.client.output_files import write_file

GIB = 2**30
SAMPLE_EVERY_S = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every part takes."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny transformer and small images: a dry run")


def timed_ms(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def repeat_ms(action: Callable[[], object], repeats: int, seconds: float = float("inf")) -> list[float]:
    """Milliseconds of each of ``repeats`` runs, fewer where they would take longer than ``seconds`` together."""
    took: list[float] = []
    while len(took) < repeats and (not took or sum(took) + took[-1] < seconds * 1e3):
        took.append(timed_ms(action))
    return took


def anonymous_bytes(pid: int | str = "self") -> int:
    """Memory that a process holds of its own, not of files or segments. Source: proc_pid_status(5), "RssAnon"."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/status has no RssAnon: the process has ended")


class AnonymousPeak:
    """The most that each of some processes holds of its own while a ``with`` block runs, beyond what it held before."""

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


class Report:
    """What a part has found, written to a file after every addition, so that a part that is cut short leaves that."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {}
        # The suite ends a part that takes too long; leaving by an exception ends its daemon and its ranks too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by the suite"))

    def add(self, **found: Any) -> None:
        self.found.update(found)
        write_file(self._path, json.dumps(self.found, indent=1).encode(), b"\n")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
