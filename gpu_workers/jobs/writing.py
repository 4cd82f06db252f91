"""Write the results of calls: trees of tensors into an I/O block."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.parallel.client_blocks import OpenClientBlock
from xditd.ipc import limits
from xditd.ipc.arguments import Argument, InIo, ListOf, MapOf, TupleOf
from xditd.ipc.errors import Unsupported
from xditd.ipc.processes import identify
from xditd.ipc.requests import Call
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.host_shm import HostArena
from xditd.ipc.transports.tensor_views import align, dtype_name, inverse_order, memory_order, place
from xditd.ipc.worker_messages import CallResults

Write = Callable[[torch.Tensor], Argument]
"""Copies a tensor to its place, and returns its description."""
Describe = Callable[[Any, Write], Argument]


@dataclass(frozen=True, eq=False)
class DeviceRoom:
    """The place for large results in the client's block of device memory."""

    io: OpenClientBlock
    offset_bytes: int
    end_bytes: int

    @classmethod
    def of(cls, job: Call, io: OpenClientBlock | None) -> DeviceRoom | None:
        """Return the room of a call; ``None`` if it has none, or this rank cannot write to it."""
        if io is None or not io.can_write or not job.device_out_size_bytes:
            return None
        start = align(job.device_out_offset_bytes)
        return cls(io, start, job.device_out_offset_bytes + job.device_out_size_bytes)

    def place(self, tensors: Sequence[torch.Tensor]) -> dict[int, int]:
        """Return the offset of each tensor that goes into the room, by its number: large ones on a GPU, in order."""
        found: dict[int, int] = {}
        at = self.offset_bytes
        for number, tensor in enumerate(tensors):
            if tensor.is_cuda and tensor.nbytes >= limits.DEVICE_IO_FROM_BYTES and at + tensor.nbytes <= self.end_bytes:
                found[number] = at
                at = align(at + tensor.nbytes)
        return found


class ResultWriter:
    """Writes trees into ``size_bytes`` of the client's block, or into a block of this process if they are larger.

    Large tensors go into ``room`` instead, as far as they fit.
    """

    def __init__(
        self,
        io: OpenIo,
        offset_bytes: int,
        size_bytes: int,
        provide: Callable[[int], HostArena],
        room: DeviceRoom | None = None,
    ) -> None:
        self._io = io
        self._start = align(offset_bytes)
        self._end = offset_bytes + size_bytes
        self._provide = provide
        self._room = room

    def begin(
        self,
        trees: Sequence[Any],
        describe: Describe | None = None,
        changed: Sequence[Mapping[str, Any]] = (),
        describe_changed: Describe | None = None,
    ) -> CallResults:
        """Begin to copy every tensor to an aligned place, and return the description of the trees.

        Wait for the current stream before the results are used or this process answers.

        ``describe`` describes a tree (default: :func:`describe_tree`), and calls its second argument for each tensor
        that is to be copied, in the same order every time. ``changed`` are the arguments of each part that the forwards
        may have changed; ``describe_changed`` describes them (default: ``describe``). With ``describe``, results keep
        the order of their dimensions in memory.

        Raises:
            OutOfMemory: there is no memory for a block of this process.
            Unsupported, UnsupportedDtype: a result has a type or dtype that messages do not have.
        """
        keeps_order = describe is not None
        describe = describe or describe_tree
        describe_changed = describe_changed or describe
        tensors: list[torch.Tensor] = []
        for tree in trees:
            describe(tree, tensors.append)
        for value in (value for each in changed for value in each.values()):
            describe_changed(value, tensors.append)
        on_device = self._room.place(tensors) if self._room is not None else {}
        offsets, total = place([0 if number in on_device else each.nbytes for number, each in enumerate(tensors)])
        fits = self._start + total <= self._end
        arena = None if fits else self._provide(total)
        first = self._start if fits else 0
        numbers = itertools.count()
        put = self._put_into_io if arena is None else partial(_put_into_arena, arena)

        def write(tensor: torch.Tensor) -> Argument:
            in_memory = memory_order(tensor) if keeps_order else None
            stored = tensor if in_memory is None else tensor.permute(in_memory)
            number = next(numbers)
            is_on_device = self._room is not None and number in on_device
            leaf = InIo(
                offset_bytes=on_device[number] if is_on_device else first + offsets[number],
                dtype=dtype_name(tensor.dtype, "result"),
                shape=tuple(stored.shape),
                order=None if in_memory is None else inverse_order(in_memory),
                in_device_io=is_on_device,
            )
            if self._room is not None and is_on_device:
                self._room.io.write("result", leaf.place, stored)
            else:
                put(leaf.place, stored)
            return leaf

        described = tuple(describe(tree, write) for tree in trees)
        arguments = tuple({name: describe_changed(value, write) for name, value in each.items()} for each in changed)
        if arena is None:
            return CallResults(trees=described, changed=arguments)
        return CallResults(trees=described, changed=arguments, block=arena.block(), provider=identify(os.getpid()))

    def _put_into_io(self, where: IoTensor, tensor: torch.Tensor) -> None:
        self._io.write("result", where, tensor, waits=False)


def _put_into_arena(arena: HostArena, where: IoTensor, tensor: torch.Tensor) -> None:
    arena.tensor(where.offset_bytes, where.dtype, where.shape).copy_(tensor, non_blocking=True)


def describe_tree(tree: Any, write: Write) -> Argument:
    """Describe lists, tuples and maps of tensors and plain values; calls ``write`` for each tensor, in order.

    Raises:
        Unsupported: there is a value of another type.
    """
    if isinstance(tree, torch.Tensor):
        return write(tree)
    if isinstance(tree, tuple):
        return TupleOf(items=tuple(describe_tree(each, write) for each in tree))
    if isinstance(tree, list):
        return ListOf(items=tuple(describe_tree(each, write) for each in tree))
    if isinstance(tree, dict):
        return MapOf(items={str(key): describe_tree(each, write) for key, each in tree.items()})
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise Unsupported(f"result: a {type(tree).__name__} cannot be sent; tensors, lists, tuples and maps can")
