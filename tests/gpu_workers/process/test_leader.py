"""The leader waits for its ranks, and says which of them was lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.multiprocessing

from xditd.gpu_workers.process import leader
from xditd.gpu_workers.process.die_with_parent import has_no_reader
from xditd.ipc.errors import WorkersLost

Wait = Callable[[], bool]


@pytest.fixture
def ranks() -> Iterator[list[SpawnProcess]]:
    """Two processes that wait."""
    spawn = torch.multiprocessing.get_context("spawn")
    started = [spawn.Process(target=time.sleep, args=(600,), daemon=True) for _ in range(2)]
    for process in started:
        process.start()
    yield started
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def wait(ranks: list[SpawnProcess], monkeypatch: pytest.MonkeyPatch) -> Iterator[Wait]:
    """Wait for the ranks as the leader does. So far the kernel has ended three processes for want of memory."""
    monkeypatch.setattr(leader.host_limits, "count_memory_kills", lambda: 3)
    pipes = [torch.multiprocessing.Pipe(duplex=False) for _ in ranks]
    before = signal.getsignal(signal.SIGTERM)
    sigterm = leader._watch_sigterm()
    yield lambda: leader._wait_for_ranks(ranks, [reader for reader, _ in pipes], sigterm, kills_before=3)
    signal.signal(signal.SIGTERM, before)
    os.close(sigterm)
    for each in (pipe for pair in pipes for pipe in pair):
        each.close()


@pytest.mark.parametrize(("device", "is_told"), [("auto", True), ("cpu", False)])
def test_gpus_that_torch_does_not_see_are_named(
    device: str, is_told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``CUDA_VISIBLE_DEVICES`` names others, or the driver is broken: nothing else would say why workers are slow."""
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/dev/nvidia0"), Path("/dev/nvidia1")]))
    monkeypatch.setattr(leader, "_run", lambda *_: 0)
    options: Any = SimpleNamespace(device=device, workers="auto", degrees={})
    assert leader.lead(options, 0, []) == 0
    assert ("torch sees none of this machine's 2 GPUs" in caplog.text) is is_told


def test_sigterm_ends_the_wait(wait: Wait) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait() is True


def test_the_wait_ends_when_nobody_reads_the_output(monkeypatch: pytest.MonkeyPatch, wait: Wait) -> None:
    """A program between daemon and leader outlives a killed daemon: the kernel does not end the leader."""
    reader, writer = os.pipe()
    monkeypatch.setattr(leader, "OUTPUT", writer)
    assert not has_no_reader(writer)
    os.close(reader)
    with pytest.raises(WorkersLost, match="the daemon has ended"):
        wait()
    os.close(writer)


def test_a_killed_rank_is_named_although_the_daemon_has_ended_the_group(ranks: list[SpawnProcess], wait: Wait) -> None:
    """The daemon often hears first of the loss, from another rank."""
    ranks[1].kill()
    os.kill(os.getpid(), signal.SIGTERM)
    assert connection.wait([ranks[1].sentinel], timeout=30)
    with pytest.raises(WorkersLost, match="rank 1 was killed by SIGKILL") as raised:
        wait()
    assert "MemoryMax=" not in raised.value.detail


def test_a_rank_that_the_kernel_ended_for_want_of_memory_is_named_with_the_limit(
    ranks: list[SpawnProcess], wait: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader.host_limits, "count_memory_kills", lambda: 4)
    monkeypatch.setattr(leader.host_limits, "describe_memory", lambda: "2.00 GiB for its control group (memory.max)")
    ranks[1].kill()
    assert connection.wait([ranks[1].sentinel], timeout=30)
    with pytest.raises(WorkersLost, match=r"rank 1 was killed by SIGKILL .*: out of host memory") as raised:
        wait()
    assert "2.00 GiB for its control group" in raised.value.detail
    assert "MemoryMax=" in raised.value.detail
