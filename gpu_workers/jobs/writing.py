"""Write the results of calls: trees of tensors into an I/O block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.ipc.arguments import Argument, InIo, ListOf, MapOf, TupleOf
from xditd.ipc.errors import Unsupported
from xditd.ipc.processes import identify
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.host_shm import HostArena
from xditd.ipc.transports.tensor_views import align, dtype_name, place
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


class ResultWriter:
    """Writes trees into ``size_bytes`` of the client's block, or into a block of this process if they are larger."""

    def __init__(self, io: OpenIo, offset_bytes: int, size_bytes: int, provide: Callable[[int], HostArena]) -> None:
        self._io = io
        self._start = align(offset_bytes)
        self._end = offset_bytes + size_bytes
        self._provide = provide

    def write(self, trees: Sequence[Any]) -> CallResults:
        """Copy every tensor to an aligned place, and return the description of the trees.

        Raises:
            OutOfMemory: there is no memory for a block of this process.
            Unsupported, UnsupportedDtype: a result has a type or dtype that messages do not have.
        """
        tensors = [tensor for tree in trees for tensor in leaves(tree)]
        offsets, total = place([tensor.nbytes for tensor in tensors])
        fits = self._start + total <= self._end
        arena = None if fits else self._provide(total)
        first = self._start if fits else 0
        places = iter(
            InIo(offset_bytes=first + offset, dtype=dtype_name(tensor.dtype, "result"), shape=tuple(tensor.shape))
            for tensor, offset in zip(tensors, offsets, strict=True)
        )
        put = self._put_into_io if arena is None else partial(_put_into_arena, arena)
        described = tuple(_write_tree(tree, places, put) for tree in trees)
        if arena is None:
            return CallResults(trees=described)
        return CallResults(trees=described, block=arena.block(), provider=identify(os.getpid()))

    def _put_into_io(self, where: IoTensor, tensor: torch.Tensor) -> None:
        self._io.write("result", where, tensor)


def _put_into_arena(arena: HostArena, where: IoTensor, tensor: torch.Tensor) -> None:
    arena.tensor(where.offset_bytes, where.dtype, where.shape).copy_(tensor)


def _write_tree(tree: Any, places: Iterator[InIo], put: Put) -> Argument:
    if isinstance(tree, torch.Tensor):
        leaf = next(places)
        put(leaf.place, tree)
        return leaf
    if isinstance(tree, tuple):
        return TupleOf(items=tuple(_write_tree(each, places, put) for each in tree))
    if isinstance(tree, list):
        return ListOf(items=tuple(_write_tree(each, places, put) for each in tree))
    if isinstance(tree, dict):
        return MapOf(items={str(key): _write_tree(each, places, put) for key, each in tree.items()})
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise Unsupported(f"result: a {type(tree).__name__} cannot be sent; tensors, lists, tuples and maps can")
