"""The memory of an idle rank is counted by part; on GPUs what torch keeps is given back after a while."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

from xditd.gpu_workers.models import class_models
from xditd.gpu_workers.process import driver_memory, idle_memory
from xditd.gpu_workers.process.idle_memory import COUNT_AFTER_S, TRIM_AFTER_S, IdleMemory, count_parts
from xditd.ipc.status import MemoryParts

if TYPE_CHECKING:
    from one_rank import OneRank

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SEGMENTS = [
    {"device": 0, "segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 70},
    {"device": 0, "segment_pool_id": (0, 3), "total_size": 30, "allocated_size": 5},
    {"device": 1, "segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 1000},
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand for torch's allocator: ``reserved`` bytes, of which 10 stay after a trim; ``trims`` counts those."""
    state = SimpleNamespace(reserved=100, trims=0)

    def trim() -> None:
        state.trims += 1
        state.reserved = 10

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: state.reserved)
    monkeypatch.setattr(torch.cuda, "empty_cache", trim)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: SEGMENTS)
    return state


def idle(device: torch.device, now: list[float]) -> IdleMemory:
    counts = iter(range(1, 9))
    return IdleMemory(device, lambda: MemoryParts(weights_bytes=next(counts)), lambda: 0, lambda: now[0])


def test_memory_is_counted_after_a_second_and_trimmed_later(gpu: SimpleNamespace) -> None:
    now = [50.0]
    memory = idle(CUDA, now)
    assert memory.wait_s == COUNT_AFTER_S
    memory.run_due()
    assert memory.take() is None  # not yet
    now[0] += COUNT_AFTER_S
    memory.run_due()
    assert memory.take() == MemoryParts(weights_bytes=1)
    assert memory.take() is None  # each count once
    assert gpu.trims == 0
    now[0] += TRIM_AFTER_S
    memory.run_due()
    assert gpu.trims == 1
    assert memory.take() == MemoryParts(weights_bytes=2)
    assert memory.wait_s is None  # nothing is left to do until the next command


def test_a_command_begins_the_times_again(gpu: SimpleNamespace) -> None:
    now = [50.0]
    memory = idle(CUDA, now)
    for _ in range(20):  # a client that sends a command every few seconds
        now[0] += 5.0
        memory.note_command()
        memory.run_due()
    assert (gpu.trims, memory.take()) == (0, None)
    assert memory.wait_s == COUNT_AFTER_S


def test_nothing_is_trimmed_on_the_cpu(gpu: SimpleNamespace) -> None:
    now = [50.0]
    memory = idle(torch.device("cpu"), now)
    now[0] += TRIM_AFTER_S
    memory.run_due()
    memory.run_due()
    assert (gpu.trims, memory.take()) == (0, MemoryParts(weights_bytes=2))


def vae(channels: int) -> torch.nn.Module:
    return diffusers.AutoencoderKL(block_out_channels=(channels,), norm_num_groups=4, sample_size=8)


def test_a_dropped_model_that_imports_have_frozen_is_freed(rank: OneRank, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in reference cycles, and no collection visits frozen objects: it would be kept as long as the rank."""
    monkeypatch.setattr(class_models, "MAX_MODELS", 1)
    components, now = rank.components, [50.0]
    memory = IdleMemory(CPU, MemoryParts, lambda: components.models_dropped, lambda: now[0])
    rank.lend("first", vae(4))
    model = weakref.ref(components.get("first", "module").match.model)

    def idle_for_long() -> None:
        memory.note_command()
        now[0] += TRIM_AFTER_S
        memory.run_due()
        memory.run_due()

    try:
        gc.collect()
        gc.freeze()  # as each import behind readiness does
        components.unmap("first")
        idle_for_long()
        frozen = gc.get_freeze_count()
        assert model() is not None  # kept for a lend of the same class
        rank.lend("second", vae(8))
        gc.collect()
        assert model() is not None
        idle_for_long()
        assert model() is None
        assert gc.get_freeze_count() > frozen / 2  # the modules are left out of collections as before
        monkeypatch.setattr(gc, "collect", lambda: pytest.fail("nothing was dropped since"))
        idle_for_long()
    finally:
        gc.unfreeze()


def test_parts_add_up_to_what_the_driver_says(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    components: Any = SimpleNamespace(weights_bytes=40, packed=SimpleNamespace(scratch=SimpleNamespace(size_bytes=7)))
    monkeypatch.setattr(idle_memory.peer_memory, "total_bytes", lambda: 20)
    monkeypatch.setattr(driver_memory, "held_bytes", {"GPU-1": 500}.get)
    found = count_parts(CUDA, "GPU-1", components)
    assert found == MemoryParts(
        weights_bytes=40,
        scratch_bytes=7,
        graphs_bytes=30,
        exchange_bytes=20,
        tensors_bytes=23,
        reserve_bytes=30,
        context_bytes=350,
    )
    assert sum(found.by_part.values()) == 500
    assert found.beyond_weights_bytes == 460
    unknown = count_parts(CUDA, "GPU-2", components)
    assert unknown.context_bytes is None
    assert "context" not in unknown.by_part


def nvml(processes: list[tuple[int, int]], status: int = 0) -> SimpleNamespace:
    """NVML with these processes and bytes on the GPU ``GPU-1``."""

    def handle(uuid: bytes, _: object) -> int:
        return 0 if uuid == b"GPU-1" else 2

    def running(_: object, count: Any, room: Any) -> int:
        if room is None:
            count._obj.value = len(processes)
            return 7
        assert count._obj.value >= len(processes)
        count._obj.value = len(processes)
        for number, (pid, used_bytes) in enumerate(processes):
            room[number].pid, room[number].used_bytes = pid, used_bytes
        return status

    return SimpleNamespace(nvmlDeviceGetHandleByUUID=handle, nvmlDeviceGetComputeRunningProcesses_v3=running)


@pytest.mark.parametrize(
    ("processes", "status", "expected"),
    [
        ([(1, 5), (os.getpid(), 9)], 0, 9),
        ([(1, 5)], 0, None),  # a container that numbers its processes by itself
        ([(os.getpid(), 2**64 - 1)], 0, None),
        ([(os.getpid(), 9)], 3, None),
    ],
)
def test_the_driver_says_what_this_process_holds(
    processes: list[tuple[int, int]], status: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_memory, "_open", lambda: nvml(processes, status))
    assert driver_memory.held_bytes("GPU-1") == expected
    assert driver_memory.held_bytes("GPU-2") is None


@pytest.mark.parametrize("error", [OSError("no such library"), AttributeError("too old")])
def test_without_nvml_nothing_is_known(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Callable[[], int]:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    driver_memory._open.cache_clear()
    try:
        assert driver_memory.held_bytes("GPU-1") is None
    finally:
        driver_memory._open.cache_clear()


@pytest.mark.gpu
def test_a_context_is_counted_on_a_gpu() -> None:
    tensor = torch.ones(2**20, device=CUDA)
    held = driver_memory.held_bytes(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    assert held is None or held > torch.cuda.memory_reserved(CUDA) >= tensor.nbytes
