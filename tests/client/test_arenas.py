"""Arenas on the host: one block for all tensors, found by address."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from xditd.client.arenas import Arena, host_arena_at
from xditd.ipc.errors import BadRequest, Closed, Internal, OutOfMemory, Unsupported, UnsupportedDtype
from xditd.ipc.processes import identify
from xditd.ipc.transports.host_shm import map_shm

SHAPES = {
    "a": (torch.float32, (3, 5)),
    "b": (torch.bfloat16, (7,)),
    "empty": (torch.float32, (0, 4)),
    "c": (torch.int8, ()),
}


def test_tensors_have_the_asked_dtypes_and_shapes_and_do_not_overlap() -> None:
    arena = Arena(SHAPES)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in arena.tensors.items()} == SHAPES
    for number, tensor in enumerate(arena.tensors.values()):
        tensor.fill_(number + 1)
    assert [tensor.unique().tolist() for tensor in arena.tensors.values()] == [[1], [2], [], [4]]
    for tensor in arena.tensors.values():
        if tensor.numel():
            assert tensor.data_ptr() % 256 == 0
            assert host_arena_at(tensor.data_ptr()) is arena
    del tensor
    arena.close()


def test_what_is_written_is_what_a_mapping_reads() -> None:
    arena = Arena({"a": (torch.uint8, (4,))})
    mapping = map_shm(arena.block(), identify(os.getpid()))
    arena.tensors["a"].copy_(torch.tensor([9, 8, 7, 6]))
    assert mapping.bytes_tensor()[:4].tolist() == [9, 8, 7, 6]
    mapping.close()
    arena.close()


def test_copies_are_exact_and_counted() -> None:
    source = {"a": torch.randn(6, 4).T, "b": torch.randn(5).bfloat16(), "c": torch.zeros(1).expand(3)}
    arena = Arena.copy_of(source)
    assert all(torch.equal(arena.tensors[name], tensor) for name, tensor in source.items())
    assert (arena.copied.host_to_host, arena.copied.total) == (96 + 10 + 12, 96 + 10 + 12)
    assert arena.fill_ms > 0
    arena.close()
    made = Arena(SHAPES)
    assert made.copied.total == 0
    made.close()


def test_copies_keep_the_order_in_memory_if_asked() -> None:
    image = torch.randn(2, 3, 4, 5)
    source = {"last": image.to(memory_format=torch.channels_last), "turned": image[0, 0].T, "plain": image}
    arena = Arena.copy_of(source, keeps_order=True)
    assert all(torch.equal(arena.tensors[name], tensor) for name, tensor in source.items())
    assert {name: tensor.stride() for name, tensor in arena.tensors.items()} == {
        name: tensor.stride() for name, tensor in source.items()
    }
    arena.close()


def test_parameters_that_need_gradients_are_copied_without_history() -> None:
    arena = Arena.copy_of({"a": torch.nn.Parameter(torch.ones(3))})
    assert not arena.tensors["a"].requires_grad
    arena.close()


def test_addresses_outside_are_in_no_arena() -> None:
    arena = Arena(SHAPES)
    base, size = arena.base_address, arena.size_bytes
    assert host_arena_at(base) is arena
    assert host_arena_at(base + size - 1) is arena
    assert host_arena_at(base - 1) is not arena
    assert host_arena_at(base + size) is not arena
    assert host_arena_at(0) is None
    arena.close()
    assert host_arena_at(base) is None


def test_a_tensor_kept_elsewhere_is_safe_and_closing_can_be_tried_again() -> None:
    arena = Arena(SHAPES)
    kept = arena.tensors["a"]
    kept.fill_(2)
    with pytest.raises(Internal, match="still alive"):
        arena.close()
    assert kept.sum() == 30  # no segmentation fault
    del kept
    arena.close()
    arena.close()


def test_a_hundred_arenas_leave_nothing(open_fds: Callable[[], int]) -> None:
    gc.collect()
    before = open_fds()
    for _ in range(100):
        Arena(SHAPES).close()
    assert open_fds() == before


def test_an_arena_without_references_is_freed(open_fds: Callable[[], int]) -> None:
    gc.collect()
    before = open_fds()
    address = Arena(SHAPES).base_address
    gc.collect()
    assert open_fds() == before
    assert host_arena_at(address) is None


@pytest.mark.parametrize(
    ("shapes", "error"),
    [
        ({"a": (torch.complex32, (2,))}, UnsupportedDtype),
        ({"a": (torch.float32, (2,)), "b": (torch.float32, (-1, 3))}, BadRequest),
        ({"a": (torch.float32, (-2, -2))}, BadRequest),
        ({"a": (torch.float32, (2**40, 2**20))}, OutOfMemory),
        ({"a": (torch.float32, (2**63,))}, OutOfMemory),
    ],
)
def test_what_cannot_be_allocated_leaves_nothing(
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], error: type[Exception], open_fds: Callable[[], int]
) -> None:
    gc.collect()
    before = open_fds()
    with pytest.raises(error):
        Arena(shapes)
    assert open_fds() == before


def test_a_copy_that_fails_leaves_nothing(open_fds: Callable[[], int]) -> None:
    gc.collect()
    before = open_fds()
    with pytest.raises(NotImplementedError):
        Arena.copy_of({"a": torch.ones(3), "nothing in it": torch.ones(3, device="meta")})
    assert open_fds() == before


@pytest.mark.parametrize("device", ["meta", "mps", "nonsense", "cuda:99", "cpu:x", ""])
def test_devices_that_cannot_be_shared(device: str) -> None:
    with pytest.raises(Unsupported, match="arena on device"):
        Arena(SHAPES, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none() -> None:
    with pytest.raises(Unsupported, match="no GPU"):
        Arena(SHAPES, "cuda")


def test_arenas_come_and_go_while_others_are_looked_up() -> None:
    """Clients lend from several threads."""
    stop = threading.Event()
    fixed = Arena(SHAPES)

    def churn() -> None:
        while not stop.is_set():
            arena = Arena({"a": (torch.uint8, (1,))})
            assert host_arena_at(arena.base_address) is arena
            arena.close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            churning = [pool.submit(churn) for _ in range(3)]
            try:
                for _ in range(20_000):
                    assert host_arena_at(fixed.base_address) is fixed
            finally:
                stop.set()
        for future in churning:
            future.result()
    finally:
        sys.setswitchinterval(interval)
    fixed.close()


def test_a_closed_arena_says_so():
    arena = Arena({"w": (torch.float32, (2, 2))})
    assert repr(arena) == f"<Arena on the host, {arena.size_bytes} bytes, 1 tensors>"
    arena.close()
    arena.close()
    assert repr(arena).endswith("bytes, closed>")
    for use in (arena.block, lambda: list(arena.fill({"w": torch.zeros(2, 2)}))):
        with pytest.raises(Closed, match="it is closed and its memory is freed; make a new Arena"):
            use()


@pytest.mark.parametrize(
    "shapes",
    [[1], None, {"a": None}, {"a": (torch.float32, (1.5,))}, {"a": (torch.float32, "ab")}, {"a": ("float32", (1,))}],
)
def test_what_is_no_shape_is_refused_by_name(shapes: Any) -> None:
    with pytest.raises(BadRequest, match=r"arena.*give a dtype and a shape by name, such as {'weight"):
        Arena(shapes)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"other": torch.zeros(7)}, "tensor other has no place in the arena; it has a, b, empty, c"),
        (
            {"b": torch.zeros(1)},
            r"tensor b: torch.float32 \[1\] for the arena's torch.bfloat16 \[7\]; give one",
        ),
        ({"a": torch.zeros(3, 5, dtype=torch.complex64)}, "tensor a: torch.complex64 .* a real one for a real one"),
        ({"b": [0.0] * 7}, "b is a list, not a tensor: leave it out"),
        ([torch.zeros(7)], "arena: .* is of type list; give a dict of tensors by name"),
    ],
)
def test_what_has_no_place_is_refused_and_nothing_is_copied(tensors: Any, says: str) -> None:
    arena = Arena(SHAPES)
    with pytest.raises(BadRequest, match=says):
        list(arena.fill({"c": torch.tensor(5)} | tensors if isinstance(tensors, dict) else tensors))
    assert arena.tensors["c"] == 0
    arena.close()
    with pytest.raises(BadRequest, match=r"not a tensor|a dict of tensors"):
        Arena.copy_of({"b": [0.0]} if isinstance(tensors, dict) else tensors)  # type: ignore[dict-item]
