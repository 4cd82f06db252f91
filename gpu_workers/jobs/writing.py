"""Write the results of calls: trees of tensors into an I/O block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.ipc.arguments import Argument, InIo, ListOf, MapOf, TupleOf
from xditd.ipc.errors import Unsupported
from xditd.ipc.processes import identify
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.host_shm import HostArena
from xditd.ipc.transports.tensor_views import align, dtype_name, inverse_order, memory_order, place
from xditd.ipc.worker_messages import CallResults


def leaves(tree: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor of a tree."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from leaves(each)
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from leaves(each)


Put = Callable[[IoTensor, torch.Tensor], None]
Write = Callable[[torch.Tensor], Argument]
"""Copy a tensor to its place, and return its description."""
Describe = Callable[[Any, Write], Argument]


class ResultWriter:
    """Writes trees into ``size_bytes`` of the client's block, or into a block of this process if they are larger."""

    def __init__(self, io: OpenIo, offset_bytes: int, size_bytes: int, provide: Callable[[int], HostArena]) -> None:
        self._io = io
        self._start = align(offset_bytes)
        self._end = offset_bytes + size_bytes
        self._provide = provide

    def write(
        self, trees: Sequence[Any], describe: Describe | None = None, changed: Sequence[Mapping[str, Any]] = ()
    ) -> CallResults:
        """Copy every tensor to an aligned place, and return the description of the trees.

        ``describe`` describes a tree (default: :func:`describe_tree`), and calls its second argument for each tensor
        that is to be copied, in the same order every time. ``changed`` are the arguments of each part that the forwards
        may have changed. With ``describe``, results keep the order of their dimensions in memory.

        Raises:
            OutOfMemory: there is no memory for a block of this process.
            Unsupported, UnsupportedDtype: a result has a type or dtype that messages do not have.
        """
        keeps_order = describe is not None
        describe = describe or describe_tree
        tensors: list[torch.Tensor] = []
        for tree in (*trees, *(value for each in changed for value in each.values())):
            describe(tree, tensors.append)
        offsets, total = place([tensor.nbytes for tensor in tensors])
        fits = self._start + total <= self._end
        arena = None if fits else self._provide(total)
        first = self._start if fits else 0
        places = iter(offsets)
        put = self._put_into_io if arena is None else partial(_put_into_arena, arena)

        def write(tensor: torch.Tensor) -> Argument:
            in_memory = memory_order(tensor) if keeps_order else None
            stored = tensor if in_memory is None else tensor.permute(in_memory)
            leaf = InIo(
                offset_bytes=first + next(places),
                dtype=dtype_name(tensor.dtype, "result"),
                shape=tuple(stored.shape),
                order=None if in_memory is None else inverse_order(in_memory),
            )
            put(leaf.place, stored)
            return leaf

        described = tuple(describe(tree, write) for tree in trees)
        arguments = tuple({name: describe(value, write) for name, value in each.items()} for each in changed)
        if arena is None:
            return CallResults(trees=described, changed=arguments)
        return CallResults(trees=described, changed=arguments, block=arena.block(), provider=identify(os.getpid()))

    def _put_into_io(self, where: IoTensor, tensor: torch.Tensor) -> None:
        self._io.write("result", where, tensor)


def _put_into_arena(arena: HostArena, where: IoTensor, tensor: torch.Tensor) -> None:
    arena.tensor(where.offset_bytes, where.dtype, where.shape).copy_(tensor)


def describe_tree(tree: Any, write: Write) -> Argument:
    """Describe lists, tuples and maps of tensors and plain values."""
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
