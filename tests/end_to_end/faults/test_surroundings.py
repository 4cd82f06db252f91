"""What lies around daemon and ranks and is not theirs: a folder that is removed, and what a parent left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xditd.client import Client
from xditd.ipc.status import GroupState

FOREIGN = ("queue", "socket", "pickle", "logging", "numpy", "torch", "xfuser", "xditd")

SPOIL = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.closerange(0, 3)
os.execv(sys.argv[1], sys.argv[1:])
"""

TORCHRUN = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8"},
    **{"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "PYTHONINSPECT": "1", "CUDA_MODULE_LOADING": "EAGER"},
}
"""What a parent framework sets for processes of its own."""


@pytest.mark.long
@pytest.mark.slow
def test_the_runtime_folder_is_removed_and_a_rank_dies(daemon, client, good_job, wait_until):
    """Sockets are back within seconds, connections stay, and the rebuilt ranks find daemon and each other."""
    before = client.status()
    removed = daemon.runtime_dir.rename(daemon.runtime_dir.with_name("removed"))
    shutil.rmtree(removed)
    good_job()
    wait_until((daemon.runtime_dir / "workers.sock").exists, "the folder to be made again")
    os.kill(before.workers[1].pid, signal.SIGKILL)
    wait_until(lambda: client.status().group_state is not GroupState.READY, "the daemon to notice")
    good_job()
    assert client.status().counters.group_starts == before.counters.group_starts + 1
    assert daemon.status().pid == before.pid  # found by its path


def state_of(pid: int, key: str) -> int:
    """A set of signals as a bit mask. Source: proc(5), /proc/pid/status."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{key}:")), 16)


@pytest.fixture
def start_here(tmp_path):
    """Start ``xditd serve`` in a folder with foreign modules, by a parent that spoils what a child inherits."""
    here = tmp_path / "here"
    (here / "home").mkdir(parents=True)
    for name in FOREIGN:
        (here / f"{name}.py").write_text(
            f"open({str(tmp_path / 'foreign')!r}, 'a').write('{name} ')\nraise SystemExit(1)\n"
        )
    serve = [Path(sys.executable).with_name("xditd"), "serve", "--workers", "1", "--device", "cpu"]
    daemon = subprocess.Popen(
        [sys.executable, "-P", "-c", SPOIL, *map(str, serve), "--runtime-dir", "../run"],
        cwd=here,
        env={**os.environ, **TORCHRUN, "HOME": str(here / "home")},
    )
    yield daemon, here
    if daemon.poll() is None:
        daemon.kill()
    daemon.wait()


@pytest.mark.long
@pytest.mark.slow
def test_everything_that_a_parent_may_leave_behind(
    start_here, tmp_path, files, make_inputs, run, processes, wait_until
):
    daemon, here = start_here
    wait_until((tmp_path / "run" / "daemon.sock").exists, "the daemon to listen")
    with Client(tmp_path / "run") as client:
        wait_until(lambda: client.status().group_state is GroupState.READY, "the workers to be ready")
        (rank,) = (worker.pid for worker in client.status().workers)
        leader = processes.parent_of(rank)
        for pid in (daemon.pid, leader, rank):
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert state_of(pid, "SigBlk") == 0
            assert not state_of(pid, "SigIgn") & 1 << (signal.SIGCHLD - 1)
        for pid in (leader, rank):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert not {name.partition(b"=")[0].decode() for name in environ} & set(TORCHRUN)
        shutil.rmtree(here)  # with the home folder in it
        os.kill(rank, signal.SIGKILL)
        wait_until(lambda: client.status().counters.group_starts == 2, "the rebuild to start")
        wait_until(lambda: client.status().group_state is GroupState.READY, "the workers to be ready again")
        with client.lend(files.transformer) as loan:
            assert torch.isfinite(run(client, loan, make_inputs())).all()
    assert not (tmp_path / "foreign").exists()
    daemon.terminate()
    assert daemon.wait(timeout=30) == 0
