"""The daemon under test: start it, ask it, wait for it, restart it after a fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from leaks import ResourceCounts, count_resources, files_left_in
from process_tree import descendants, is_running

from xditd.client import Client, DaemonStatus, XditdError
from xditd.client.waiting import SERVING
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.status import GroupState

START_S = 240.0
"""Time limit for a daemon to answer, and for its workers to be ready: twice the daemon's own start deadline."""
STOP_S = 30.0
HANG_DEADLINE_S = 8
FLAGS = ("--device", "cpu", "--workers", "2", "--hang-deadline-s", str(HANG_DEADLINE_S), "--max-restarts", "1000")


class Target:
    """One runtime folder and its daemon. ``problems`` names what did not end as it must."""

    def __init__(self, folder: Path, flags: Sequence[str] = FLAGS) -> None:
        self.runtime = RuntimeDir(folder / "run")
        self.log = folder / "daemon.log"
        self.problems: list[str] = []
        self.starts = 0
        self.listeners_lost = 0
        """Sockets of this daemon whose paths were removed."""
        self.started_at = time.monotonic()
        self._folder, self._flags = folder, flags
        self.process = self.start()

    @property
    def working_folder(self) -> Path:
        """The daemon's working folder."""
        return self._folder / f"started-in-{self.starts}"

    def start(self) -> subprocess.Popen[bytes]:
        """Start a daemon on the runtime folder, from a working folder of its own."""
        self.starts += 1
        self.listeners_lost = 0
        self.started_at = time.monotonic()
        self.working_folder.mkdir()
        self.process = self.start_another(self.log, self.working_folder)
        return self.process

    def start_another(self, log_path: Path, working_folder: Path | None = None) -> subprocess.Popen[bytes]:
        """Start one more daemon on the same runtime folder; the caller has to end it."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("XDITD_")}
        command = [sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(self.runtime.path), *self._flags]
        with log_path.open("ab") as log:
            return subprocess.Popen(command, stderr=log, env=environment, cwd=working_folder or self._folder)

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait_ready()

    def ask(self) -> DaemonStatus:
        """Ask for the status in a session of its own.

        Raises:
            XditdError: no answer within 5 s.
        """
        with Client(self.runtime.path, name="runner") as client:
            return client.status(deadline_s=5.0)

    def find_status(self) -> DaemonStatus | None:
        """Return the status, or ``None`` without an answer."""
        try:
            return self.ask()
        except XditdError:
            return None

    def wait_answer(self) -> DaemonStatus:
        """Wait until the daemon answers, with or without workers."""
        return self._wait(lambda status: True, "no answer")

    def wait_ready(self) -> DaemonStatus:
        """Wait until the workers are ready.

        Raises:
            TimeoutError: they are not within :data:`START_S`, or the daemon has ended.
        """
        return self._wait(is_up, "no workers")

    def _wait(self, holds: Callable[[DaemonStatus], bool], else_say: str) -> DaemonStatus:
        ends = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < ends:
            status = self.find_status()
            if status is not None and holds(status):
                return status
            time.sleep(0.2)  # between two polls
        what = "is there" if self.process.poll() is None else f"ended with status {self.process.returncode}"
        raise TimeoutError(
            f"{else_say} within {START_S:.0f} s; the daemon {what}; its last warnings: {self.log_tail()}"
        )

    def wait_idle(self, before: ResourceCounts | None = None) -> ResourceCounts | None:
        """Wait until the workers are ready without components and jobs, and return their resources.

        Mapped segments have to be at most those of ``before``, or without it the same in two counts. If that never
        happens, it is a problem.
        """
        most = None if before is None else before.segments
        ends = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < ends:
            status = self.find_status()
            is_idle = status is not None and status.group_state is GroupState.READY and status.clients == 1
            if status is not None and is_idle and not status.components and not status.jobs:
                time.sleep(0.5)  # until the connection of find_status is closed
                held = self.find_resources()
                if held is not None and most is not None and held.segments <= most:
                    return held
                most = most if before or held is None else held.segments
            time.sleep(0.5)  # between two polls
        self.problems.append(f"the daemon and its workers were not idle within {START_S:.0f} s")
        return self.find_resources()

    def find_resources(self) -> ResourceCounts | None:
        """Return the resources now, or ``None`` if the daemon or one of its processes is ending."""
        try:
            return count_resources(self.process.pid)
        except (ProcessLookupError, FileNotFoundError):
            return None

    def log_size(self) -> int:
        return self.log.stat().st_size

    def log_since(self, size: int) -> str:
        with self.log.open("rb") as log:
            log.seek(size)
            return log.read().decode("utf-8", "replace")

    def log_tail(self) -> str:
        """Return the last lines above level INFO."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if " INFO " not in line]
        return " | ".join(lines[-3:])[-600:]

    def stop(self) -> None:
        """Stop the daemon with SIGTERM; processes that do not end in time are killed and named in ``problems``."""
        below = descendants(self.process.pid) if self.process.poll() is None else set()
        is_first_to_end_it = self.process.poll() is None
        self.process.terminate()
        try:
            self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.problems.append(f"the daemon did not stop within {STOP_S:.0f} s of SIGTERM")
        else:
            if is_first_to_end_it and self.process.returncode != 0:
                self.problems.append(f"the daemon ended with status {self.process.returncode} after SIGTERM")
        ends = time.monotonic() + STOP_S
        while (left := [pid for pid in below if is_running(pid)]) and time.monotonic() < ends:
            time.sleep(0.1)  # between two polls
        for pid in left:
            self.problems.append(f"process {pid} outlived its daemon")
            os.kill(pid, 9)
        if names := files_left_in(self.runtime.path, allowed=frozenset({self.runtime.lock.name})):
            self.problems.append(f"the daemon left {', '.join(names)} in its runtime folder")

    def keep_log(self, path: Path) -> None:
        shutil.copyfile(self.log, path)


def is_up(status: DaemonStatus) -> bool:
    return status.group_state in SERVING
