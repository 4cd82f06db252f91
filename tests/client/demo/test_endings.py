"""The demo that a signal ends: its daemon and the workers end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytestmark = pytest.mark.slow

DEADLINE_S = 90.0


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a path so short that a socket's fits in it; those of pytest's workers are longer."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _started(temporary: Path, out: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start the demo, and wait for its daemon: give both, the daemon by its process id."""
    command = [Path(sys.executable).with_name("xditd"), "demo", "--device", "cpu", "--out", out]
    environ = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ)
    daemons: list[int] = []
    try:
        ends_s = time.monotonic() + DEADLINE_S
        while not daemons and time.monotonic() < ends_s:
            assert process.poll() is None
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            daemons = [int(each) for each in children if _is_daemon(int(each))]
            time.sleep(0.02)
        assert daemons, "no daemon"
        yield process, daemons[0]
    finally:
        process.kill()
        process.wait()
        for pid in daemons:
            if _is_daemon(pid):
                os.kill(pid, signal.SIGKILL)


def _is_daemon(pid: int) -> bool:
    try:
        return b"xditd.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_closed_terminal_ends_the_demo_with_its_daemon(temporary: Path, tmp_path: Path) -> None:
    with _started(temporary, tmp_path) as (process, daemon):
        process.send_signal(signal.SIGHUP)
        assert process.wait(DEADLINE_S) == 130
        assert not _is_daemon(daemon)
        assert not list(temporary.glob("xditd-demo-*"))


def test_the_daemon_of_a_killed_demo_ends(temporary: Path, tmp_path: Path) -> None:
    with _started(temporary, tmp_path) as (process, daemon):
        process.kill()
        process.wait()
        ends_s = time.monotonic() + DEADLINE_S
        while _is_daemon(daemon) and time.monotonic() < ends_s:
            time.sleep(0.02)
        assert not _is_daemon(daemon)
