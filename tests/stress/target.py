"""The daemon under stress: started, looked at, and started again when a fault has ended it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from leaks import Holdings, files_left_in, holdings_of
from process_tree import descendants, is_running

from xditd.client import Client, DaemonStatus, XditdError
from xditd.client.waiting import SERVING
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.status import GroupState

START_S = 240.0
"""For a daemon to answer, and for its workers to be ready or ready again: twice the daemon's own start deadline."""
STOP_S = 30.0
HANG_DEADLINE_S = 8
FLAGS = ("--device", "cpu", "--workers", "2", "--hang-deadline-s", str(HANG_DEADLINE_S), "--max-restarts", "1000")


class Target:
    """One runtime folder and the daemon that serves from it. ``problems`` says what did not end as it must."""

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
        """Where the daemon was started."""
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
        """Start one more daemon on the same runtime folder, as by mistake; it is the caller's to end."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("XDITD_")}
        command = [sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(self.runtime.path), *self._flags]
        with log_path.open("ab") as log:
            return subprocess.Popen(command, stderr=log, env=environment, cwd=working_folder or self._folder)

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait_ready()

    def ask(self) -> DaemonStatus:
        """Ask for the status through the runtime folder, in a session of its own.

        Raises:
            XditdError: it was not answered within 5 s.
        """
        with Client(self.runtime.path, name="runner") as client:
            return client.status(deadline_s=5.0)

    def find_status(self) -> DaemonStatus | None:
        """The status, or ``None`` where nobody answers."""
        try:
            return self.ask()
        except XditdError:
            return None

    def wait_answer(self) -> DaemonStatus:
        """Wait until the daemon answers, whatever its workers do."""
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
            time.sleep(0.2)  # between two looks
        what = "is there" if self.process.poll() is None else f"ended with status {self.process.returncode}"
        raise TimeoutError(
            f"{else_say} within {START_S:.0f} s; the daemon {what}; its last warnings: {self.log_tail()}"
        )

    def wait_idle(self, before: Holdings | None = None) -> Holdings | None:
        """Wait until ready workers hold nothing of anybody, and say what is open then.

        That they never do is a problem. What they have mapped has to be no more than ``before``; without
        it, the same at two looks.
        """
        most = None if before is None else before.segments
        ends = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < ends:
            status = self.find_status()
            is_idle = status is not None and status.group_state is GroupState.READY and status.clients == 1
            if status is not None and is_idle and not status.components and not status.jobs:
                time.sleep(0.5)  # the connection of this very look closes, too
                held = self.find_holdings()
                if held is not None and most is not None and held.segments <= most:
                    return held
                most = most if before or held is None else held.segments
            time.sleep(0.5)  # between two looks
        self.problems.append(f"the daemon and its workers did not come to rest within {START_S:.0f} s")
        return self.find_holdings()

    def find_holdings(self) -> Holdings | None:
        """What is open now; ``None`` where the daemon or one of its processes is on its way out."""
        try:
            return holdings_of(self.process.pid)
        except (ProcessLookupError, FileNotFoundError):
            return None

    def log_size(self) -> int:
        return self.log.stat().st_size

    def log_since(self, size: int) -> str:
        with self.log.open("rb") as log:
            log.seek(size)
            return log.read().decode("utf-8", "replace")

    def log_tail(self) -> str:
        """The last lines that are more than a note of something done."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if " INFO " not in line]
        return " | ".join(lines[-3:])[-600:]

    def stop(self) -> None:
        """End the daemon as an operator does; what does not end in time, or stays behind, is a problem, and killed."""
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
            time.sleep(0.1)  # between two looks
        for pid in left:
            self.problems.append(f"process {pid} outlived its daemon")
            os.kill(pid, 9)
        if names := files_left_in(self.runtime.path, allowed=frozenset({self.runtime.lock.name})):
            self.problems.append(f"the daemon left {', '.join(names)} in its runtime folder")

    def keep_log(self, path: Path) -> None:
        shutil.copyfile(self.log, path)


def is_up(status: DaemonStatus) -> bool:
    return status.group_state in SERVING
