"""Faults of the runtime folder: remove it, its lock or its sockets while the daemon runs, as cleaners of /tmp do."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

from faults import Broken, Fault, NotNow, Pace, StressRun
from target import START_S

NOTICE_S = 20.0
"""Time limit for the daemon to be reachable again or to end."""
UNREACHABLE_S = NOTICE_S + 10.0
"""How long clients may find no daemon, with time to connect again."""
SECOND_START_S = 3.0
"""A second daemon is started at most this long after the lock is removed."""


def remove_folder(stress: StressRun) -> None:
    stress.record.expect_daemon_gone(UNREACHABLE_S)
    size = stress.target.log_size()
    shutil.rmtree(stress.target.runtime.path, ignore_errors=True)
    stress.target.listeners_lost += 2
    wait_for_recovery(stress, size, stress.target.runtime.client_socket)


def unlink_socket(stress: StressRun) -> None:
    """Remove the clients' socket, or the workers', which is first needed at the next rebuild."""
    runtime = stress.target.runtime
    socket = stress.rng.choice((runtime.client_socket, runtime.worker_socket))
    stress.record.expect_daemon_gone(UNREACHABLE_S)
    size = stress.target.log_size()
    socket.unlink(missing_ok=True)
    stress.target.listeners_lost += 1
    wait_for_recovery(stress, size, socket)


def wait_for_recovery(stress: StressRun, log_size: int, removed: Path) -> None:
    """Wait until the daemon has made the removed file again and answers, or has ended and logged the reason."""
    target = stress.target
    ends = time.monotonic() + NOTICE_S
    while time.monotonic() < ends:
        if target.process.poll() is not None:
            check_end(target.process.returncode, target.log_since(log_size), str(target.runtime.path))
            stress.record.expect_daemon_gone(START_S)
            target.restart()
            return
        if removed.exists() and target.find_status() is not None:
            return
        time.sleep(0.2)  # between two polls
    what = "is there" if removed.exists() else "is gone"
    raise Broken(f"{removed} {what}, and the daemon neither answered nor ended within {NOTICE_S:.0f} s")


def check_end(status: int, log: str, folder: str) -> None:
    """Check that a daemon ended by itself and logged that its folder is the reason.

    Raises:
        Broken: a signal killed it, or no error in its log names the folder.
    """
    if status < 0:
        raise Broken(f"the daemon died of signal {-status}")
    said = [line for line in log.splitlines() if re.search(r"\b(ERROR|WARNING|CRITICAL)\b", line) and folder in line]
    if not said:
        raise Broken(f"the daemon ended with status {status}, and no error in its log names {folder}: {log[-400:]}")


def unlink_lock(stress: StressRun) -> None:
    """Unlink the lock, then start a second daemon on the folder: one of the two must serve, and the other end."""
    target = stress.target
    if target.find_status() is None:
        raise NotNow
    size = target.log_size()
    target.runtime.lock.unlink(missing_ok=True)
    time.sleep(stress.rng.uniform(0, SECOND_START_S))  # so that the first daemon has noticed, or has not yet
    stress.record.expect_daemon_gone(UNREACHABLE_S)
    second = target.start_another(target.log.with_name("second-daemon.log"))
    ends = time.monotonic() + NOTICE_S
    while second.poll() is None and target.process.poll() is None and time.monotonic() < ends:
        time.sleep(0.2)  # between two polls
    if second.poll() is None:
        if target.process.poll() is None:
            end(second)
            raise Broken(f"two daemons on one folder: both ran for {NOTICE_S:.0f} s")
        check_end(target.process.returncode, target.log_since(size), str(target.runtime.path))
        stress.record.expect_daemon_gone(START_S)
        end(second)
        target.restart()
        return
    if second.returncode != 1:
        raise Broken(f"a second daemon on the same folder ended with status {second.returncode}, not 1")
    status = target.find_status()
    if status is None or status.pid != target.process.pid:
        raise Broken("the second daemon was refused, but the first does not answer any more")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(START_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


FAULTS = (
    Fault(
        "remove-folder",
        Pace.HEAVY,
        "the runtime folder is removed: the daemon serves again within seconds, or ends and logs why",
        remove_folder,
    ),
    Fault("unlink-socket", Pace.HEAVY, "a socket is unlinked: as above", unlink_socket),
    Fault("unlink-lock", Pace.HEAVY, "the lock is unlinked, and a second daemon started: it is refused", unlink_lock),
)
