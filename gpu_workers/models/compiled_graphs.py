"""The compiled graphs of this process: made by another process, kept in a folder, and loaded by a thread.

The folder is of this user alone, since what is loaded from it is code. In it is a folder for each version of torch and
Python and each kind of device, so that a restart, another rank, and another model with the same operations find what
was made before. Nothing here compiles. The thread does not import torch's compiler, but waits until the thread that
runs forwards has imported it (docs/starts.md).
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from xditd.gpu_workers.kernels.cache_folder import own_folder, remove_unused, write_whole
from xditd.gpu_workers.models import attention_operator, packed_operator, product_operator
from xditd.gpu_workers.models.block_compiler import (
    ARTIFACT,
    FAILED,
    GRAPH,
    MAX_REASON_CHARS,
    has_loaders,
    import_loaders,
    load,
    one_line,
)
from xditd.gpu_workers.models.block_rewrites import VERSION as REWRITES

logger = logging.getLogger(__name__)

GraphFunction = Callable[..., Sequence[torch.Tensor]]
"""A compiled graph: its inputs by place, and all its results."""

LIMIT_S: Final = 900.0
"""The longest time for one graph; after it the compiler's process is killed."""

MAX_ON_DISK: Final = 512
"""The most graphs in the folder; those that were asked for longest ago go first."""

UNUSED_DAYS: Final = 30.0
"""Folders of other versions are removed after so many days without use."""

_THREADS: Final = "TORCHINDUCTOR_COMPILE_THREADS"
_MAX_PROCESSES: Final = 8
"""The most processes that compile for one rank: one for every four processors, up to this."""

_SCHEMAS: Final = " ".join(each.SCHEMA for each in (attention_operator, packed_operator, product_operator))
_POLL_S: Final = 0.05
_COMPILER: Final = "xditd.gpu_workers.models.block_compiler"


@dataclass(frozen=True, slots=True)
class GraphState:
    """The state of a graph: ``making``, then ``made``, or ``failed`` for a reason, after ``seconds``."""

    phase: Literal["making", "made", "failed"]
    function: GraphFunction | None = None
    reason: str = ""
    seconds: float = 0.0
    was_on_disk: bool = False


_MAKING: Final = GraphState("making")


class CompiledGraphs:
    """The compiled graphs of this process, by name. One for each process: the compiler's cache is set for all of it.

    The thread that runs forwards calls ``make``, ``find`` and ``let_load``, which wait for no other thread. ``close``
    ends the thread that loads, and the compiler's process.

    Raises:
        Unsupported: another user can write to the folder.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = own_folder(folder, "compiled code is loaded from it") / _versions(device)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        os.utime(self.folder)
        with suppress(OSError):
            remove_unused(self.folder.parent, self.folder.name, UNUSED_DAYS)
        # Loading needs none of the processes in which torch's compiler compiles. The daemon sets this as well: the
        # leader of forked ranks has imported the compiler by now.
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"), _THREADS: "1"}
        self._states: dict[str, GraphState] = {}
        self._pending: list[str] = []
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._may_load = has_loaders()
        self._import_error: Exception | None = None
        self._is_closed = False
        self.waits = False
        """Whether the thread waits for :meth:`let_load`."""

    def make(self, graphs: Mapping[str, bytes]) -> None:
        """Begin to make graphs, given by name and encoded, that are not known yet."""
        with self._changed:
            new = [name for name in graphs if name not in self._states and not self._is_closed]
            if not new:
                return
            self._states.update(dict.fromkeys(new, _MAKING))
        try:
            for name in new:
                path = self.folder / name
                path.mkdir(mode=0o700, exist_ok=True)
                (path / FAILED).unlink(missing_ok=True)  # of another process: this one tries once more
                if not (path / GRAPH).exists():
                    write_whole(path / GRAPH, graphs[name])
                os.utime(path)
        except OSError as error:
            self._fail(new, f"the folder of compiled graphs: {error}")
            return
        with self._changed:
            self._pending += new
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="compiled graphs", daemon=True)
                self._thread.start()
            self._changed.notify()

    @property
    def needs_imports(self) -> bool:
        """Whether graphs were asked for that are not loaded before :meth:`let_load`."""
        return self._thread is not None and not self._may_load

    def let_load(self) -> None:
        """Import what loading needs, and let the thread load. If the import fails, all graphs fail with its error."""
        if self._may_load:
            return
        try:
            import_loaders()
        except Exception as error:  # noqa: BLE001  # whatever a compiler raises; the thread reports it
            self._import_error = error
        with self._changed:
            self._may_load = True
            self._changed.notify()

    def find(self, name: str) -> GraphState | None:
        """Return the state of a graph, or ``None`` if it was never asked for."""
        return self._states.get(name)

    def refuse(self, name: str, reason: str) -> None:
        """Never use a graph again in this process, since it failed when it ran."""
        self._states[name] = GraphState("failed", reason=reason[:MAX_REASON_CHARS])

    def close(self) -> None:
        """End the compiler's process and the thread. What is made stays on disk."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            process = self._process
        if process is not None:
            process.kill()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closed)
                if self._is_closed:
                    return
                names, self._pending = self._pending, []
            try:
                self._make(names)
            except Exception as error:  # no fault of a compiler may end the thread, or reach a forward
                logger.exception("compiled graphs")
                self._fail([name for name in names if self._states[name] is _MAKING], one_line(error))

    def _make(self, names: list[str]) -> None:
        """Load graphs; those that are not on disk first have to be compiled."""
        waiting = []
        for name in names:
            if not (self.folder / name / ARTIFACT).exists() or not self._load(name):
                waiting.append(name)
        while waiting:
            waiting = self._compile(waiting)
        with suppress(OSError):  # another rank may remove the same ones
            self._prune()

    def _compile(self, names: list[str]) -> list[str]:
        """Compile graphs in another process, and load each when it is done; return those that are left when it ends."""
        began_s = time.monotonic()
        with self._changed:
            if self._is_closed:
                return []
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", _COMPILER, str(self.folder), *names],
                stdin=subprocess.PIPE,  # it ends when this process does
                stdout=subprocess.DEVNULL,
                env=os.environ | {_THREADS: str(max(1, min(_MAX_PROCESSES, (os.cpu_count() or 1) // 4)))},
            )
        left = list(names)
        try:
            while left:
                has_ended = process.poll() is not None
                if self._finish(left[0], began_s):
                    left.pop(0)
                    began_s = time.monotonic()
                elif self._is_closed:
                    return []
                elif has_ended or time.monotonic() - began_s > LIMIT_S:
                    why = f"ended with status {process.returncode}" if has_ended else f"took over {LIMIT_S:.0f} s"
                    self._fail(left[:1], f"the compiler's process {why}")
                    return left[1:]
                else:
                    time.sleep(_POLL_S)
        finally:
            process.kill()
            process.communicate()
            self._process = None
        return left

    def _finish(self, name: str, began_s: float) -> bool:
        """Load the graph, or note its reason, once the compiler's process has left one; return whether it has."""
        if (self.folder / name / ARTIFACT).exists():
            self._load(name, began_s)
            return True
        try:
            reason = (self.folder / name / FAILED).read_text(errors="replace")
        except FileNotFoundError:  # another process that asks for the same graph removes it first
            return False
        self._fail([name], reason)
        return True

    def _load(self, name: str, began_s: float | None = None) -> bool:
        """Load a graph; return False if it was on disk and cannot be read: then it is compiled again.

        ``began_s`` is when its compilation began, ``None`` for a graph that was on disk.
        """
        if not self._await_imports():
            return True
        artifact = self.folder / name / ARTIFACT
        load_began_s = time.monotonic()
        try:
            function = load(artifact)
        except Exception as error:  # noqa: BLE001  # whatever a compiler raises
            if began_s is None:
                logger.warning("graph %s is compiled again: %s", name, one_line(error))
                artifact.unlink(missing_ok=True)
                return False
            self._fail([name], f"loading: {one_line(error)}")
            return True
        seconds = time.monotonic() - (load_began_s if began_s is None else began_s)
        self._states[name] = GraphState("made", function, "", seconds, was_on_disk=began_s is None)
        return True

    def _await_imports(self) -> bool:
        """Wait for :meth:`let_load` or :meth:`close`; return False after a close.

        Raises:
            Exception: the error of the import.
        """
        with self._changed:
            self.waits = not self._may_load
            self._changed.wait_for(lambda: self._may_load or self._is_closed)
            self.waits = False
            if self._is_closed:
                return False
        if self._import_error is not None:
            raise self._import_error
        return True

    def _fail(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            logger.warning("graph %s is not compiled: %s", name, reason)
            self._states[name] = GraphState("failed", reason=reason[:MAX_REASON_CHARS])

    def _prune(self) -> None:
        """Remove the graphs that were asked for longest ago, if there are too many."""
        with suppress(OSError):  # another process removes the same ones, or writes to one of them
            found = [each for each in self.folder.iterdir() if (each / GRAPH).exists()]
            found = [each for each in found if each.name not in self._states]
            found.sort(key=lambda each: each.stat().st_mtime)
            for each in found[: max(0, len(found) + len(self._states) - MAX_ON_DISK)]:
                for file in each.iterdir():
                    file.unlink(missing_ok=True)
                each.rmdir()


def _versions(device: torch.device) -> str:
    """Return the name of the folder for this torch, this Python, this kind of device and these rewrites."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {_processor()}"
    versions = f"{torch.__version__} {platform.python_version()} {device.type} {kind} {_SCHEMAS} {REWRITES}"
    return hashlib.blake2b(versions.encode(), digest_size=8).hexdigest()


def _processor() -> str:
    return str(torch.backends.cpu.get_cpu_capability())
