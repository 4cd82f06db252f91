"""Turning what a client holds into a manifest: for each tensor the first tier that needs no copy.

| tensors | tier | copied |
|---|---|---|
| on a GPU, in memory that CUDA can export | ``cuda_ipc``, the allocations as they are | nothing |
| on a GPU, in a pool that cannot be exported | ``cuda_ipc``, an arena | once, on that GPU |
| on the CPU, in an :class:`~xditd.client.arenas.Arena` | ``host_shm`` | nothing |
| on the CPU, an unwritten slice of a mapped file | ``file`` | nothing |
| on the CPU, anything else | ``host_shm``, an arena | once, on the host |
| a path | ``file``; with ``device``, ``cuda_ipc`` after one load | nothing; once, to that GPU |
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xditd.client.arenas import Arena, device_named, host_arena_at
from xditd.client.file_loading import load_into_arena
from xditd.client.file_mappings import AddressSpace
from xditd.client.lend_checks import check_manifest, state_of
from xditd.ipc.addresses import expand_home
from xditd.ipc.errors import BadCheckpoint, BadRequest, XditdError, named
from xditd.ipc.file_kinds import shard_of
from xditd.ipc.name_lists import in_log_lines
from xditd.ipc.recognition import form_error
from xditd.ipc.tensors import Block, ComponentKind, CopiedBytes, Manifest, TensorSpec
from xditd.ipc.transports import cuda_ipc
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.safetensors_header import read_header
from xditd.ipc.transports.tensor_views import dtype_name

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Offer:
    """A component that is ready to be lent, and the owner of what the loan needs until it ends.

    Holds the storages of the lent tensors, the arenas made for them and the open files. Call
    :meth:`close` once the workers have unmapped the component.
    """

    def __init__(self, manifest: Manifest, copied: CopiedBytes, timings_ms: dict[str, float], held: _Held) -> None:
        self.manifest = manifest
        self.copied = copied
        self.timings_ms = timings_ms
        self.tier_notes = tuple(held.notes)
        self._held = held

    def close(self) -> None:
        """Let go of the lent memory. A second call does nothing."""
        self._held.close()


class _Held:
    """Blocks being collected, and everything that keeps their memory alive."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.copied = CopiedBytes()
        self.notes: list[str] = []
        self._keys: dict[tuple[Any, ...], int] = {}
        self._storages: list[object] = []
        self._arenas: list[Arena] = []
        self._files: dict[str, LentFile] = {}

    def block_number(self, key: tuple[Any, ...], make: Callable[[], Block]) -> int:
        """Number of the block with this key; made when it is first asked for."""
        if key not in self._keys:
            self.blocks.append(make())
            self._keys[key] = len(self.blocks) - 1
        return self._keys[key]

    def keep(self, storage: object) -> None:
        self._storages.append(storage)

    def own_arena(self, arena: Arena) -> Arena:
        self._arenas.append(arena)
        self.copied = self.copied + arena.copied
        return arena

    def open_file(self, path: str) -> LentFile:
        if path not in self._files:
            self._files[path] = LentFile(path)
        return self._files[path]

    def close(self) -> None:
        self._storages.clear()
        while self._files:
            self._files.popitem()[1].close()
        while self._arenas:
            self._arenas.pop().close()


def describe(
    source: Mapping[str, torch.Tensor] | str | os.PathLike[str] | torch.nn.Module,
    *,
    kind: ComponentKind | None = None,
    label: str | None = None,
    device: str | None = None,
    generation: int = 0,
) -> Offer:
    """Get a component ready to be lent.

    ``source`` is a state dict, a module (its ``state_dict()``), or the path of a safetensors file.
    ``device`` (``cuda``, ``cuda:N``) loads it into an arena there first. Without ``kind`` the workers
    tell it by the tensors. ``generation`` rises when memory that is lent already was written to.

    Raises:
        BadCheckpoint: the file is not a sound safetensors file.
        StaleSource: the file changed while it was being read.
        BadRequest: a tensor has no memory that can be shared.
        Unsupported: there is no such ``device``, or the tensors are of a form that is known not to run.
        UnsupportedDtype: a dtype that cannot cross.
        OutOfMemory: no room for an arena.
    """
    held = _Held()
    started = time.perf_counter()
    try:
        if isinstance(source, (str, bytes, os.PathLike)):
            path = expand_home(os.fsdecode(source))
            label = label or os.fsencode(Path(path).stem).decode("utf-8", "replace")  # names need not be Unicode
            specs = _describe_file(path, label, device, held)
        else:
            label = label or "state_dict"
            specs = _describe_tensors(state_of(source), device, held)
        manifest = Manifest(
            kind=kind, label=label, blocks=tuple(held.blocks), tensors=tuple(specs), generation=generation
        )
        check_manifest(manifest)
    except BaseException as error:
        if isinstance(error, XditdError):
            for line in in_log_lines(error.names):
                logger.info("not lent, all of the names: %s", line)
        traceback.clear_frames(error.__traceback__)  # they hold views, and an arena with views cannot be freed
        held.close()
        raise
    return Offer(manifest, held.copied, {"describe": (time.perf_counter() - started) * 1e3}, held)


def _describe_file(path: str, label: str, device: str | None, held: _Held) -> list[TensorSpec]:
    shard = shard_of(path)
    if shard is not None:
        raise BadCheckpoint(f"{path}: this is {shard}")
    lent = held.open_file(path)
    header = read_header(lent.fd, path)
    if device is not None:
        known = form_error({stored.name: stored for stored in header.tensors})
        if known is not None:  # the workers would say so once everything is loaded
            raise named(label, known)
        arena = held.own_arena(load_into_arena(lent, header, device))
        held.notes.append(f"loaded once into an arena of {arena.size_bytes} bytes on {device}")
        return _describe_tensors(arena.tensors, None, held)
    number = held.block_number(("file", path), lambda: lent.block(header.length_bytes))
    held.notes.append(f"file tier: workers map {path}; nothing is read into this process")
    return [TensorSpec(s.name, s.dtype, s.shape, number, s.offset_bytes) for s in header.tensors]


def _describe_tensors(tensors: Mapping[str, torch.Tensor], device: str | None, held: _Held) -> list[TensorSpec]:
    import torch

    if device is not None:
        wanted = device_named(device)
        places = {tensor.device for tensor in tensors.values()}
        if any(place.type != wanted.type or wanted.index not in (None, place.index) for place in places):
            tensors = held.own_arena(Arena.copy_of(tensors, device)).tensors
            held.notes.append(f"copied once into an arena on {device}, as asked")
    for index in sorted({tensor.device.index for tensor in tensors.values() if tensor.is_cuda}):
        torch.cuda.synchronize(index)  # weights that are still being written must not be exported

    specs: dict[str, TensorSpec] = {}
    homeless: dict[str, torch.Tensor] = {}
    finder = _HostFinder(held)
    segments = _Segments(held)
    for name, tensor in tensors.items():
        if tensor.is_neg():
            spec = None  # its memory holds the negatives of its values
        elif tensor.is_cuda:
            spec = segments.find(name, tensor)
        elif tensor.device.type == "cpu":
            spec = finder.find(name, tensor)
        else:
            raise BadRequest(f"tensor {name} lies on device {tensor.device}: only cpu and cuda tensors can be lent")
        if spec is None:
            homeless[name] = tensor
        else:
            specs[name] = spec
    specs.update(_rehouse(homeless, held))
    return [specs[name] for name in tensors]


class _Segments:
    """Lends CUDA tensors by the allocation that they lie in; one driver call for each allocation, not each tensor."""

    def __init__(self, held: _Held) -> None:
        self._held = held
        self._known: dict[int, tuple[int, int]] = {}
        self._unexportable: set[int] = set()
        self._last = (0, 0)

    def find(self, name: str, tensor: torch.Tensor) -> TensorSpec | None:
        address = tensor.data_ptr()
        base, size = self._last
        if not base <= address < base + size:
            try:
                base, size = cuda_ipc.segment_of(tensor)
            except cuda_ipc.NotExportable:
                return None
            self._last = (base, size)
        if base in self._unexportable:
            return None

        def make() -> Block:
            whole = cuda_ipc.wrap_segment(base, size, tensor.device.index)
            length = _spec(
                name, tensor, 0, 0
            ).extent_bytes  # what follows may be another tensor, and change at any time
            return cuda_ipc.export_allocation(base, whole, tensor.device.index, address - base, length)

        try:
            number = self._held.block_number(("cuda", tensor.device.index, base), make)
        except cuda_ipc.NotExportable:
            self._unexportable.add(base)
            return None
        self._held.keep(tensor.untyped_storage())
        return _spec(name, tensor, number, address - base)


class _HostFinder:
    """Lends CPU tensors that lie in an arena or are an unwritten slice of a mapped file."""

    def __init__(self, held: _Held) -> None:
        self._held = held
        self._space: AddressSpace | None = None

    def find(self, name: str, tensor: torch.Tensor) -> TensorSpec | None:
        address = tensor.data_ptr()
        arena = host_arena_at(address)
        if arena is not None:
            offset = address - arena.base_address
            number = self._held.block_number(("arena", arena.base_address), lambda: arena.block(offset))
            self._held.keep(arena)
            self._held.keep(tensor.untyped_storage())
            return _spec(name, tensor, number, offset)
        return self._find_file(name, tensor, address)

    def _find_file(self, name: str, tensor: torch.Tensor, address: int) -> TensorSpec | None:
        if self._space is None:
            self._space = AddressSpace()
        extent = _spec(name, tensor, 0, 0).extent_bytes
        mapping = self._space.file_behind(address, extent) if extent else None
        if mapping is None:
            return None
        try:
            lent = self._held.open_file(mapping.path)
        except BadCheckpoint:
            return None  # it can be mapped, but not be opened again
        if lent.identity != (mapping.device, mapping.inode):
            return None  # the name was given to another file between the look and the open
        number = self._held.block_number(("file", mapping.path), lent.block)
        self._held.keep(tensor.untyped_storage())
        return _spec(name, tensor, number, mapping.offset_of(address))


def _rehouse(homeless: Mapping[str, torch.Tensor], held: _Held) -> dict[str, TensorSpec]:
    """Copy tensors that cannot be lent where they are into one arena for each device."""
    by_device: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in homeless.items():
        by_device.setdefault(str(tensor.device), {})[name] = tensor
    specs: dict[str, TensorSpec] = {}
    for device, tensors in by_device.items():
        arena = held.own_arena(Arena.copy_of(tensors, device))
        number = held.block_number(("arena", arena.base_address), lambda arena=arena: arena.block())  # type: ignore[misc]
        for name, tensor in arena.tensors.items():
            specs[name] = _spec(name, tensor, number, tensor.data_ptr() - arena.base_address if tensor.numel() else 0)
        where = "no file holds them unchanged" if device == "cpu" else "their allocator cannot export memory"
        held.notes.append(f"{len(tensors)} tensors copied once into an arena on {device}: {where}")
    return specs


def _spec(name: str, tensor: torch.Tensor, block: int, offset_bytes: int) -> TensorSpec:
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return TensorSpec(
        name, dtype_name(tensor.dtype, f"tensor {name}"), tuple(tensor.shape), block, offset_bytes, stride
    )
