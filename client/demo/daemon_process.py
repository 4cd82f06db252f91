"""Run a private daemon as a child process: start it, connect to it, watch its sockets, stop it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from xditd.client.client import Client
from xditd.client.demo.output import writing_to
from xditd.client.subprograms import end_with_parent, module_command, module_environment
from xditd.client.waiting import wait_for
from xditd.ipc.addresses import MAX_SOCKET_PATH_BYTES, RuntimeDir
from xditd.ipc.awake_clock import AwakeClock
from xditd.ipc.errors import BadRequest, DaemonUnreachable, DeadlineExceeded, WorkersUnavailable, XditdError
from xditd.ipc.network_watch import internet_sockets
from xditd.ipc.processes import describe_exit
from xditd.ipc.status import DaemonStatus

ANSWER_DEADLINE_S: Final = 10.0
WORKERS_DEADLINE_S: Final = 180.0
_STOP_DEADLINE_S: Final = 30.0
_POLL_S: Final = 0.02
_LOG_TAIL_LINES: Final = 15


class DaemonProcess:
    """``xditd serve`` as a child process. ``log`` is the file for its and its workers' stderr.

    ``flags`` are further flags of ``xditd serve``; if they are invalid, the daemon exits, and :meth:`connect` raises.
    With ``ends_with_parent`` it stops when this process is killed.

    Raises:
        BadRequest: TMPDIR has a path that is too long for sockets below it.
        OutputFailed: no folder can be made there.
    """

    def __init__(
        self, log: Path, workers: int, device: str, flags: Sequence[str] = (), *, ends_with_parent: bool = False
    ) -> None:
        self.runtime_dir = _make_runtime_dir()
        self.log = log
        command = module_command(
            "xditd.daemon",
            ["--runtime-dir", str(self.runtime_dir), "--workers", str(workers), "--device", device, *flags],
        )
        with self._log_file() as stderr:
            # A new session, so that Ctrl-C reaches only the demo, which then stops the daemon.
            self._process = subprocess.Popen(
                command,
                env=module_environment(),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=end_with_parent if ends_with_parent else None,
            )

    def _log_file(self) -> BinaryIO:
        try:
            return self.log.open("wb")
        except OSError:
            self.runtime_dir.rmdir()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def connect(self) -> Client:
        """Wait until the daemon answers, and connect to it.

        Raises:
            DaemonUnreachable: it has exited, or does not answer in time; the message has the end of its log.
        """
        clock = AwakeClock()
        began_s = clock.now_s()
        while True:
            clock.now_s()
            try:
                return Client(self.runtime_dir, name="xditd demo")
            except DaemonUnreachable as error:
                clock.count_gap()  # takes seconds if the daemon listens but does not answer
                if self._process.poll() is not None:
                    raise DaemonUnreachable(
                        f"the daemon {describe_exit(self._process.returncode)}; its log ends:\n{self.log_tail()}"
                    ) from None
                if clock.waited_s(began_s) > ANSWER_DEADLINE_S:
                    raise DaemonUnreachable(f"{error.detail}; its log ends:\n{self.log_tail()}") from None
            time.sleep(_POLL_S)  # a start takes a tenth of a second

    def wait_ready(self, client: Client, show: Callable[[str], None]) -> DaemonStatus:
        """Wait until every worker is ready; ``show`` is called with the reason for waiting.

        Raises:
            WorkersUnavailable: the group is given up or not ready in time, or the daemon has exited; the message has
                the end of the log.
        """

        def get_status() -> DaemonStatus:
            if self._process.poll() is not None:
                raise WorkersUnavailable(f"the daemon {describe_exit(self._process.returncode)}")
            return client.status()

        try:
            return wait_for(get_status, WORKERS_DEADLINE_S, workers=True, show=show)
        except (WorkersUnavailable, DeadlineExceeded) as error:
            raise WorkersUnavailable(f"{error.detail}; the log ends:\n{self.log_tail()}") from None

    def log_tail(self) -> str:
        """The last lines of the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def outside_sockets(self) -> list[str]:
        """List the sockets of the daemon and its descendants that connect or listen beyond loopback."""
        return outside_sockets([self.pid, *descendants(self.pid)])

    def stop(self, client: Client | None) -> None:
        """Stop the daemon, by request if it answers, else by signals, and remove its folder.

        If Ctrl-C interrupts the request, the daemon gets SIGTERM; if it interrupts that, SIGKILL.
        """
        try:
            if client is not None and self._process.poll() is None:
                client.stop(deadline_s=_STOP_DEADLINE_S)
        except XditdError:
            pass  # it does not answer: _end() sends signals
        finally:
            try:
                self._end()
            finally:
                shutil.rmtree(self.runtime_dir, ignore_errors=True)

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self._process.poll() is None:
                self._process.kill()  # workers exit when their parent does
                self._process.wait()


def outside_sockets(pids: list[int]) -> list[str]:
    """List the sockets of processes that connect or listen beyond loopback."""
    found = []
    for pid in pids:
        for each in internet_sockets(pid):
            if each.is_outside:
                how = f"listens on {each.local}" if each.is_listening else f"is connected to {each.remote}"
                found.append(f"process {pid} {how} ({each.protocol})")
    return found


def descendants(pid: int) -> list[int]:
    """List the child processes of a process, recursively. Source: proc(5), /proc/pid/task/tid/children."""
    found: list[int] = []
    for task in _tasks(pid):
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in map(int, children):
            found += [child, *descendants(child)]
    return found


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return []


def _make_runtime_dir() -> Path:
    """Make a folder among the temporary ones: that of the output may have a path too long for sockets.

    Raises:
        BadRequest: so has the folder of the temporary ones.
        OutputFailed: it cannot be made.
    """
    parent = Path(tempfile.gettempdir())
    with writing_to(parent, "TMPDIR"):
        made = Path(tempfile.mkdtemp(prefix="xditd-demo-"))
    try:
        RuntimeDir(made).check_socket_paths()
    except BadRequest as error:
        made.rmdir()
        raise BadRequest(
            f"TMPDIR: sockets below {parent} would have paths above {MAX_SOCKET_PATH_BYTES} bytes; set TMPDIR to a "
            "folder with a shorter path, such as /tmp"
        ) from error
    return made
