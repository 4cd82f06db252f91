"""A daemon that does not end, does not answer, or leaves something behind is a problem of the run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import folder_faults
import process_faults
import pytest
import target
from crowd import ClientProcesses
from faults import Broken, NotNow, StressRun
from fuzzing import IDLE_WORKER
from record import Record


@pytest.fixture
def stress(monkeypatch):
    """A real daemon whose workers never come up, and no clients."""
    folder = Path(tempfile.mkdtemp(prefix="stress-"))  # not tmp_path: its sockets would not fit into an address
    (folder / "xditd.toml").write_text(f"[workers]\ncommand = {json.dumps(IDLE_WORKER)}\n")
    started = target.Target(folder, flags=["--config", str(folder / "xditd.toml")])
    started.wait_answer()
    record, rng = Record(), random.Random(1)
    yield StressRun(started, ClientProcesses(folder, started.runtime.path, [], record, rng), record, rng)
    if started.process.poll() is None:
        os.kill(started.process.pid, signal.SIGCONT)
        started.stop()
    shutil.rmtree(folder)


def test_a_daemon_that_ends_as_told_is_no_problem(stress):
    assert stress.target.ask().pid == stress.target.process.pid
    stress.target.stop()
    assert stress.target.problems == []
    assert stress.target.find_status() is None


def test_a_daemon_that_does_not_stop_is_a_problem(stress, monkeypatch):
    monkeypatch.setattr(target, "STOP_S", 0.5)
    os.kill(stress.target.process.pid, signal.SIGSTOP)
    stress.target.stop()
    assert any("did not stop within 0 s of SIGTERM" in problem for problem in stress.target.problems)
    assert any("in its runtime folder" in problem for problem in stress.target.problems)


def test_workers_that_never_come_up_are_told(stress, monkeypatch):
    monkeypatch.setattr(target, "START_S", 0.5)
    with pytest.raises(TimeoutError, match="no workers within 0 s; the daemon is there"):
        stress.target.wait_ready()


def test_a_socket_that_does_not_come_back_is_a_broken_promise(stress, monkeypatch):
    """The daemon is stopped, so that it can neither make the socket again nor end."""
    monkeypatch.setattr(folder_faults, "NOTICE_S", 0.5)
    os.kill(stress.target.process.pid, signal.SIGSTOP)
    with pytest.raises(Broken, match="neither answered nor ended"):
        folder_faults.unlink_socket(stress)


def test_a_lock_whose_loss_nobody_makes_good_is_a_broken_promise(stress, monkeypatch):
    """The first is stopped as soon as its lock is gone, so that it can neither notice nor answer. Whether the second
    one runs or is refused: nobody is served."""
    monkeypatch.setattr(folder_faults, "NOTICE_S", 3.0)
    unlink = Path.unlink

    def unlink_and_stop(path, missing_ok=False):
        os.kill(stress.target.process.pid, signal.SIGSTOP)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_and_stop)
    with pytest.raises(Broken, match=r"two daemons on one folder|does not answer any more"):
        folder_faults.unlink_lock(stress)


def test_garbage_that_is_not_answered_is_a_broken_promise(stress, monkeypatch):
    process_faults.send_garbage(stress)
    monkeypatch.setattr(process_faults, "ANSWER_S", 0.5)
    os.kill(stress.target.process.pid, signal.SIGSTOP)
    with pytest.raises(Broken, match="garbage were not answered"):
        process_faults.send_garbage(stress)


def test_no_ranks_no_fault(stress):
    with pytest.raises(NotNow):
        process_faults.kill_rank(stress)
