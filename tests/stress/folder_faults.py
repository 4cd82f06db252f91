"""Faults of the runtime folder: it, its lock or its sockets are removed under the daemon, as cleaners of /tmp do."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

from faults import Broken, Fault, NotNow, Pace, Scene
from target import START_S

NOTICE_S = 20.0
"""For the daemon to notice, and to be reachable again or to have ended."""
UNREACHABLE_S = NOTICE_S + 10.0
"""How long clients may find no daemon: they need a moment, too."""
SECOND_START_S = 3.0
"""A second daemon is started at any time up to this after the lock is gone."""


def remove_folder(scene: Scene) -> None:
    scene.record.expect_daemon_gone(UNREACHABLE_S)
    size = scene.target.log_size()
    shutil.rmtree(scene.target.runtime.path, ignore_errors=True)
    scene.target.listeners_lost += 2
    settle(scene, size, scene.target.runtime.client_socket)


def unlink_socket(scene: Scene) -> None:
    """The clients' socket, or that of the workers, which nobody needs before the next rebuild."""
    runtime = scene.target.runtime
    socket = scene.rng.choice((runtime.client_socket, runtime.worker_socket))
    scene.record.expect_daemon_gone(UNREACHABLE_S)
    size = scene.target.log_size()
    socket.unlink(missing_ok=True)
    scene.target.listeners_lost += 1
    settle(scene, size, socket)


def settle(scene: Scene, log_size: int, removed: Path) -> None:
    """Wait until the daemon has put back what was removed and answers there, or has ended for this stated reason."""
    target = scene.target
    ends = time.monotonic() + NOTICE_S
    while time.monotonic() < ends:
        if target.process.poll() is not None:
            check_end(target.process.returncode, target.log_since(log_size), str(target.runtime.path))
            scene.record.expect_daemon_gone(START_S)
            target.restart()
            return
        if removed.exists() and target.find_status() is not None:
            return
        time.sleep(0.2)  # between two looks
    what = "is there" if removed.exists() else "is gone"
    raise Broken(f"{removed} {what}, and the daemon neither answered nor ended within {NOTICE_S:.0f} s")


def check_end(status: int, log: str, folder: str) -> None:
    """Check that a daemon ended by itself and said that its folder was why.

    Raises:
        Broken: it was killed, or its last lines do not name the folder.
    """
    if status < 0:
        raise Broken(f"the daemon died of signal {-status}")
    said = [line for line in log.splitlines() if re.search(r"\b(ERROR|WARNING|CRITICAL)\b", line) and folder in line]
    if not said:
        raise Broken(f"the daemon ended with status {status}, and no error in its log names {folder}: {log[-400:]}")


def unlink_lock(scene: Scene) -> None:
    """Unlink the lock, then start a second daemon on the folder: one of the two serves, and the other ends."""
    target = scene.target
    if target.find_status() is None:
        raise NotNow
    size = target.log_size()
    target.runtime.lock.unlink(missing_ok=True)
    time.sleep(scene.rng.uniform(0, SECOND_START_S))  # the second comes before the first notices, or after
    scene.record.expect_daemon_gone(UNREACHABLE_S)
    second = target.start_another(target.log.with_name("second-daemon.log"))
    ends = time.monotonic() + NOTICE_S
    while second.poll() is None and target.process.poll() is None and time.monotonic() < ends:
        time.sleep(0.2)  # between two looks
    if second.poll() is None:
        if target.process.poll() is None:
            end(second)
            raise Broken(f"two daemons on one folder: both ran for {NOTICE_S:.0f} s")
        check_end(target.process.returncode, target.log_since(size), str(target.runtime.path))
        scene.record.expect_daemon_gone(START_S)
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
        "the runtime folder is removed: served again within seconds, or a clean end that says so",
        remove_folder,
    ),
    Fault("unlink-socket", Pace.HEAVY, "a socket is unlinked: as above", unlink_socket),
    Fault("unlink-lock", Pace.HEAVY, "the lock is unlinked, and a second daemon started: it is refused", unlink_lock),
)
