"""Pinned pages: pinned once, never a cause of failure, and unpinned before they are unmapped."""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from enum import IntEnum

import pytest
import torch

from xditd.ipc.processes import identify
from xditd.ipc.transports import pinning
from xditd.ipc.transports.host_shm import HostArena, map_shm


class Status(IntEnum):
    SUCCESS = 0
    REFUSED = 1


class FakeDriver:
    """Keeps what is pinned, and checks that unpinned addresses are still mapped."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.status = Status.SUCCESS
        self.calls = 0

    def cuMemHostRegister(self, address: int, size_bytes: int, flags: int) -> tuple[Status]:
        self.calls += 1
        if self.status is Status.SUCCESS:
            self.pinned[address] = size_bytes
        return (self.status,)

    def cuMemHostUnregister(self, address: int) -> tuple[Status]:
        assert is_mapped(address)
        del self.pinned[address]
        return (Status.SUCCESS,)


def is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        ranges = (line.split()[0].split("-") for line in maps)
        return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(pinning, "_driver", lambda: driver)
    monkeypatch.setattr(pinning, "_context", lambda index: nullcontext())
    return driver


def test_an_arena_is_pinned_once_and_unpinned_before_it_is_unmapped(driver: FakeDriver) -> None:
    arena = HostArena(5_000)
    arena.pin(0)
    arena.pin(0)
    assert list(driver.pinned.values()) == [arena.size_bytes]
    assert driver.calls == 1
    arena.close()
    assert not driver.pinned
    arena.close()


def test_a_mapping_is_unpinned_before_it_is_unmapped(driver: FakeDriver) -> None:
    arena = HostArena(5_000)
    mapping = map_shm(arena.block(), identify(os.getpid()), is_writable=True)
    mapping.pin(0)
    assert list(driver.pinned.values()) == [mapping.size_bytes]
    mapping.close()
    assert not driver.pinned
    arena.close()


def test_what_is_forgotten_is_unpinned_too(driver: FakeDriver) -> None:
    arena = HostArena(5_000)
    arena.pin(0)
    del arena
    gc.collect()
    assert not driver.pinned


def test_a_refusal_is_no_error_and_not_repeated(driver: FakeDriver) -> None:
    driver.status = Status.REFUSED
    arena = HostArena(5_000)
    arena.pin(0)
    arena.pin(0)
    assert driver.calls == 1
    arena.close()


@pytest.mark.parametrize("error", [ImportError("no cuda-bindings"), RuntimeError("no such function")])
def test_a_driver_that_is_not_there_is_no_error(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> FakeDriver:
        raise error

    monkeypatch.setattr(pinning, "_driver", fail)
    arena = HostArena(5_000)
    arena.pin(0)
    arena.close()


def test_large_blocks_stay_pageable(driver: FakeDriver) -> None:
    arena = HostArena(pinning.MAX_BYTES + 1)
    arena.pin(0)
    assert not driver.calls
    arena.close()


def test_a_fork_leaves_its_parents_pages_alone(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = HostArena(5_000)
    arena.pin(0)
    with monkeypatch.context() as fork:
        fork.setattr(pinning.os, "getpid", lambda: -1)
        arena.close()
    assert driver.pinned


@pytest.mark.gpu
def test_a_gpu_copies_to_and_from_pinned_pages() -> None:
    values = torch.arange(256.0, device="cuda")
    for _ in range(2):  # the second time at an address that was pinned before, as likely as not
        arena = HostArena(5_000)
        arena.pin(values.device.index)
        assert arena._unpin is not None
        place = arena.tensor(0, "float32", (256,))
        assert place.is_pinned()
        place.copy_(values)
        assert torch.equal(place.to("cuda", copy=True), values)
        del place
        arena.close()
        assert not arena._unpin.alive
