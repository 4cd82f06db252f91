"""Writing results: trees of tensors into the client's block, or into one of our own if they are larger."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from xditd.gpu_workers.jobs.job_io import PROVIDED_PER_CLIENT, JobIo
from xditd.gpu_workers.jobs.writing import ResultWriter, describe_tree
from xditd.ipc.arguments import Argument, InIo, ListOf, MapOf, TupleOf
from xditd.ipc.errors import BadRequest, Unsupported, UnsupportedDtype
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.transports.host_shm import HostArena, map_shm
from xditd.ipc.worker_messages import CallResults

CPU = torch.device("cpu")
SIZE = 2 * 2**20
START = 4096
ALICE, BOB = ProcessIdentity(pid=1, start_ticks=1), ProcessIdentity(pid=2, start_ticks=1)


class Outputs:
    """A client's block, and a rank's writers to it."""

    def __init__(self) -> None:
        self.me = identify(os.getpid())
        self.arena = HostArena(SIZE)
        self.io = JobIo(CPU)

    def write(
        self, *trees: Any, size_bytes: int = SIZE - START, offset_bytes: int = START, client: ProcessIdentity = ALICE
    ) -> CallResults:
        opened = self.io.open(self.arena.block(), self.me)
        writer = ResultWriter(opened, offset_bytes, size_bytes, lambda size: self.io.provide(client, size))
        return writer.begin(trees)

    def read(self, results: CallResults, leaf: Argument) -> torch.Tensor:
        """Read a result as its client does: from its own block, or from the one that it is told of."""
        assert isinstance(leaf, InIo)
        if results.block is None:
            return self.arena.tensor(leaf.offset_bytes, leaf.dtype, leaf.shape).clone()
        assert results.provider == self.me
        mapping = map_shm(results.block, results.provider)
        stretch = mapping.bytes_tensor()[leaf.offset_bytes :][: leaf.place.size_bytes]
        found = stretch.clone().view(getattr(torch, leaf.dtype)).view(leaf.shape)
        del stretch
        mapping.close()
        return found

    def close(self) -> None:
        self.io.close()
        self.arena.close()


@pytest.fixture
def outputs() -> Iterator[Outputs]:
    outputs = Outputs()
    yield outputs
    outputs.close()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    describe_tree(tree, found.append)
    return found


def test_every_tensor_of_a_tree_is_found_in_order() -> None:
    a, b, c, d = (torch.tensor(float(number)) for number in range(4))
    assert [int(leaf) for leaf in tensors_of(({"x": a, "y": [b, None]}, 3, c, [(d,)]))] == [0, 1, 2, 3]
    assert tensors_of(None) == []


@pytest.mark.parametrize("size_bytes", [SIZE - START, 0], ids=["fits", "does not fit"])
def test_trees_keep_their_form_and_tensors_their_dtype(outputs: Outputs, size_bytes: int) -> None:
    first = (random(2, 3, 64), {"more": [random(5, dtype=torch.bfloat16), None, 0.5]})
    second = ([random(3, 2).t(), random(4, 1)],)
    results = outputs.write(first, second, size_bytes=size_bytes)
    assert (results.block is None) == (size_bytes > 0)
    one, two = results.trees
    assert isinstance(one, TupleOf)
    mapped = one.items[1]
    assert isinstance(mapped, MapOf)
    more = mapped.items["more"]
    assert isinstance(more, ListOf)
    assert more.items[1:] == (None, 0.5)
    assert isinstance(two, TupleOf)
    listed = two.items[0]
    assert isinstance(listed, ListOf)
    places = [one.items[0], more.items[0], *listed.items]
    for leaf, tensor in zip(places, tensors_of((first, second)), strict=True):
        assert isinstance(leaf, InIo)
        assert leaf.offset_bytes % 256 == 0
        found = outputs.read(results, leaf)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_results_begin_where_the_client_said_and_touch_nothing_beside(outputs: Outputs) -> None:
    with outputs.arena.view(0, SIZE) as view:
        view[:] = b"\x05" * SIZE
    (leaf,) = outputs.write(torch.zeros(300), size_bytes=1200, offset_bytes=8192).trees
    assert isinstance(leaf, InIo)
    assert leaf.offset_bytes == 8192
    with outputs.arena.view(0, SIZE) as view:
        assert view[:8192] == b"\x05" * 8192
        assert view[8192:9392] == bytes(1200)
        assert view[9392:] == b"\x05" * (SIZE - 9392)


def test_room_that_begins_between_two_places_is_used_from_the_next_one(outputs: Outputs) -> None:
    (leaf,) = outputs.write(torch.zeros(4), size_bytes=512, offset_bytes=START + 4).trees
    assert isinstance(leaf, InIo)
    assert leaf.offset_bytes == START + 256


@pytest.mark.parametrize(("size_bytes", "fits"), [(16, True), (15, False)])
def test_what_fits_to_the_last_byte_is_written_to_the_clients_block(
    outputs: Outputs, size_bytes: int, fits: bool
) -> None:
    assert (outputs.write(torch.zeros(4), size_bytes=size_bytes).block is None) is fits


def test_room_that_is_said_to_reach_beyond_the_block_is_refused(outputs: Outputs) -> None:
    with pytest.raises(BadRequest, match=f"result: ends at byte {SIZE + 256 + 16} of an I/O block of"):
        outputs.write(torch.zeros(4), offset_bytes=SIZE + 256, size_bytes=SIZE)


def test_what_no_message_can_describe_is_refused_by_its_class(outputs: Outputs) -> None:
    with pytest.raises(Unsupported, match="result: a set cannot be sent"):
        outputs.write((torch.zeros(2), {1}))
    with pytest.raises(UnsupportedDtype, match="result: dtype uint16 cannot be sent"):
        outputs.write(torch.zeros(2, dtype=torch.uint16))


def test_the_newest_blocks_of_each_client_stay_and_are_freed_with_it(
    outputs: Outputs, open_fds: Callable[[], int]
) -> None:
    outputs.write(torch.zeros(1))
    before = open_fds()
    made = [outputs.write(torch.full((4,), float(n)), size_bytes=0) for n in range(PROVIDED_PER_CLIENT + 2)]
    outputs.write(torch.zeros(4), size_bytes=0, client=BOB)
    assert open_fds() - before == 2 * (PROVIDED_PER_CLIENT + 1)  # each arena has two
    for number, results in list(enumerate(made))[2:]:
        assert outputs.read(results, results.trees[0]).tolist() == [number] * 4
    outputs.io.forget(ALICE)
    assert open_fds() - before == 2
    outputs.io.forget(ALICE)
    outputs.io.forget(BOB)
    assert open_fds() == before
