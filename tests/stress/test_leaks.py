"""Whatever a real process and its children hold beyond what they held is reported."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap

import leaks
import pytest
from process_tree import descendants

HOLDER = textwrap.dedent("""\
    import mmap, os, subprocess, sys

    kept = []

    def hold_segment():
        fd = os.memfd_create("leak")
        os.ftruncate(fd, 4096)
        kept.append(mmap.mmap(fd, 4096))
        os.close(fd)

    actions = {
        "fds": lambda: kept.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(9)),
        "memory": lambda: kept.append(b"x" * (300 << 20)),
        "segment": hold_segment,
        "child": lambda: kept.append(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])),
    }
    child = None
    for line in sys.stdin:
        where, action = line.split()
        if where == "below":
            if child is None:
                command = [sys.executable, "-c", os.environ["HOLDER"]]
                child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if action != "nothing":
                child.stdin.write(f"here {action}\\n")
                child.stdin.flush()
                child.stdout.readline()
        elif action != "nothing":
            actions[action]()
        print("done", flush=True)
""")
"""Holds more of something, itself or in a child, whenever a line of its input says so."""


@pytest.fixture
def holder():
    """A process with one child, which stand for a daemon and its workers."""
    command = [sys.executable, "-c", HOLDER]
    environment = {"HOLDER": HOLDER}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(line: str) -> None:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    ask("below nothing")
    yield process.pid, ask
    for pid in [*descendants(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_nothing_held_is_nothing_reported(holder):
    pid, ask = holder
    before = leaks.count_resources(pid)
    ask("here nothing")
    assert leaks.find_leaks(before, leaks.count_resources(pid)) == []


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("here fds", "daemon descriptors"),
        ("here memory", "daemon memory"),
        ("here child", "processes below the daemon"),
        ("below child", "processes below the daemon"),
        ("below fds", "workers' descriptors"),
        ("below segment", "segments of shared memory"),
        ("below memory", "largest worker's memory"),
    ],
)
def test_each_kind_of_leak_is_reported(holder, action, said):
    pid, ask = holder
    before = leaks.count_resources(pid)
    ask(action)
    found = leaks.find_leaks(before, leaks.count_resources(pid))
    assert any(said in leak for leak in found), found


def test_a_listener_that_was_lost_costs_one_descriptor_and_no_more(holder):
    pid, ask = holder
    before = leaks.count_resources(pid)
    ask("here fds")
    after = leaks.count_resources(pid)
    more = after.daemon_fds - before.daemon_fds - leaks.SPARE_FDS
    assert leaks.find_leaks(before, after, listeners_lost=more) == []
    assert leaks.find_leaks(before, after, listeners_lost=more - 1) != []


def test_a_process_that_is_missing_is_reported(holder):
    pid, _ask = holder
    held = leaks.count_resources(pid)
    assert leaks.find_leaks(held, dataclasses.replace(held, processes=held.processes - 1)) != []


def test_memory_that_grows_for_ever_is_reported():
    flat = [(second, 25 << 20) for second in range(0, 600, 10)]
    growing = [(second, size + second * (2 << 20) // 60) for second, size in flat]
    assert leaks.find_slope(flat, minutes=10) == []
    assert leaks.find_slope(growing, minutes=10) == ["daemon memory grows by 2048 KiB a minute, at most 1024"]
    assert leaks.find_slope(growing, minutes=2) == []  # too short to tell from a warming interpreter


def test_files_left_in_the_runtime_folder_are_named(tmp_path):
    (tmp_path / "daemon.lock").touch()
    assert leaks.files_left_in(tmp_path, frozenset({"daemon.lock"})) == []
    (tmp_path / "daemon.sock").touch()
    assert leaks.files_left_in(tmp_path, frozenset({"daemon.lock"})) == ["daemon.sock"]
