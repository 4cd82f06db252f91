"""Process identity: reused pids, zombies, and a process without free descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xditd.ipc.errors import OutOfMemory, ProcessGone
from xditd.ipc.processes import ProcessIdentity, identify, is_alive


def test_this_process_is_alive_and_always_the_same() -> None:
    me = identify(os.getpid())
    assert me.pid == os.getpid()
    assert identify(os.getpid()) == me
    assert is_alive(me)


def test_another_start_time_is_another_process() -> None:
    me = identify(os.getpid())
    assert not is_alive(ProcessIdentity(pid=me.pid, start_ticks=me.start_ticks + 1))


def test_a_command_name_with_parentheses_and_spaces() -> None:
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, b') S 0 (', 0, 0, 0); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert ") S 0 (" in Path(f"/proc/{child.pid}/stat").read_text()
        mine = identify(os.getpid()).start_ticks
        assert 0 <= identify(child.pid).start_ticks - mine < 100 * 3600
        child.stdin.close()


def test_the_age_of_a_process_begins_with_its_interpreter() -> None:
    program = "import time; time.sleep(0.3); from xditd.ipc.processes import age_s; print(age_s())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) + 1 / os.sysconf("SC_CLK_TCK") <= time.monotonic() - began + 1.0


def test_a_process_that_was_never_there() -> None:
    with open("/proc/sys/kernel/pid_max") as file:
        beyond = int(file.read()) + 1
    with pytest.raises(ProcessGone, match=str(beyond)):
        identify(beyond)


def test_a_killed_process_is_gone_even_before_its_parent_notices() -> None:
    """A zombie keeps its pid and start time, but its memory and descriptors are gone."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        before = identify(child.pid)
        assert is_alive(before)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
        assert not is_alive(before)
        with pytest.raises(ProcessGone):
            identify(child.pid)


def test_running_out_of_descriptors_is_no_proof_of_death(no_free_fd: Callable[[], None]) -> None:
    no_free_fd()
    with pytest.raises(OutOfMemory, match="open files"):
        identify(os.getpid())
