"""Describe a component in a manifest: for each tensor the first tier that needs no copy.

| tensors | tier | copied |
|---|---|---|
| on a GPU, in memory that CUDA can export | ``cuda_ipc``, the allocations as they are | nothing |
| on a GPU, in a pool that cannot be exported | ``cuda_ipc``, an arena | once, on that GPU |
| on the CPU, in an :class:`~xditd.client.arenas.Arena` | ``host_shm`` | nothing |
| on the CPU, an unwritten slice of a mapped file | ``file`` | nothing |
| on the CPU, anything else | ``host_shm``, an arena | once, on the host |
| a path, of one or more files | ``file``; with ``device``, ``cuda_ipc`` after one load | nothing; once, to that GPU |
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import msgspec

from xditd.client.arenas import Arena, device_named, host_arena_at
from xditd.client.file_headers import read_header
from xditd.client.file_loading import load_into_arena
from xditd.client.file_mappings import AddressSpace
from xditd.client.lend_checks import check_manifest, check_shards, state_of
from xditd.client.model_folders import ModelFiles, find_model, label_of
from xditd.client.module_descriptions import describe_module, is_described
from xditd.client.packed_weights import NO_PACKING, Packing, packing_of_files, packing_of_tensors
from xditd.ipc.addresses import expand_home
from xditd.ipc.errors import BadCheckpoint, BadRequest, RequestError, XditdError, named
from xditd.ipc.name_lists import in_log_lines, listed
from xditd.ipc.packed import logical_tensors
from xditd.ipc.recognition import form_error
from xditd.ipc.tensors import (
    Acceleration,
    Block,
    ComponentKind,
    ComputeDType,
    CopiedBytes,
    Manifest,
    ModuleDescription,
    TensorSpec,
)
from xditd.ipc.transports import cuda_ipc
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.tensor_views import dtype_name

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Offer:
    """A component that is ready to be lent: its manifest, and what keeps its memory alive.

    Owns the storages of the lent tensors, the arenas made for them and the open files. Call
    :meth:`close` when the workers have unmapped the component.
    """

    def __init__(
        self, manifest: Manifest, copied: CopiedBytes, timings_ms: dict[str, float], memory: _LentMemory
    ) -> None:
        self.manifest = manifest
        self.copied = copied
        self.timings_ms = timings_ms
        self.tier_notes = tuple(memory.notes)
        self._memory = memory

    def close(self) -> None:
        """Release the lent memory. May be called twice."""
        self._memory.close()


class _LentMemory:
    """The blocks of a manifest, and the storages, arenas and files that keep their memory alive."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.copied = CopiedBytes()
        self.notes: list[str] = []
        self.keeps_order = False
        """Whether copies have the order of dimensions in memory of the tensors: some kernels round by it."""
        self._keys: dict[tuple[Any, ...], int] = {}
        self._storages: list[object] = []
        self._arenas: list[Arena] = []
        self._files: dict[str, LentFile] = {}

    def block_number(self, key: tuple[Any, ...], make: Callable[[], Block]) -> int:
        """Return the number of the block with this key, and make the block at the first use."""
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
    as_class: bool = False,
    replaced: Collection[str] = (),
    variant: str | None = None,
    acceleration: str | None = None,
    compute_dtype: str | None = None,
) -> Offer:
    """Prepare a component to be lent.

    ``source`` is a state dict, a module (its ``state_dict()``), or the path of a safetensors or a GGUF file, of an
    index of several, or of a folder that diffusers or transformers has saved, of which ``variant`` selects the weights.
    ``device`` (``cuda``, ``cuda:N``) first loads it into an arena there. Without ``kind``, the workers
    determine it from the tensors. Increase ``generation`` after writing to memory that is already lent. A module of
    diffusers or transformers is described too, also by its ``config.json``; with ``as_class`` the workers run it as
    its class does, in any case. ``replaced`` are attributes of the module that are left out of the description.
    ``acceleration`` is how forwards of such a module run on GPUs. ``compute_dtype`` is the dtype into which workers
    dequantise packed weights; without it, they take the half precision of most plain weights, or bfloat16.

    Raises:
        BadCheckpoint: a file is not a valid safetensors or GGUF file, the files of a folder or an index are not
            complete, or packed weights do not have the form of their format.
        StaleSource: a file changed while it was read.
        BadRequest: a tensor has no memory that can be shared, ``variant`` is given for what is no folder, or
            ``acceleration`` for what does not run as its class.
        Unsupported: ``device`` does not exist, or the checkpoint's form is known to be unsupported.
        UnsupportedDtype: a dtype that cannot be sent to the workers.
        OutOfMemory: too little free memory for an arena.
    """
    memory = _LentMemory()
    module: ModuleDescription | None = None
    packing = NO_PACKING
    started = time.perf_counter()
    try:
        if isinstance(source, (str, bytes, os.PathLike)):
            path = expand_home(os.fsdecode(source))
            label = label or os.fsencode(label_of(path)).decode("utf-8", "replace")  # names need not be Unicode
            files = find_model(path, variant=variant, has_class=kind is None, as_class=as_class)
            module = files.description
            specs, packing = _describe_files(files, label, device, memory)
        elif variant is not None:
            raise BadRequest(f"variant {variant!r} selects one of the files of a folder: give the folder's path")
        elif kind is None and (as_class or is_described(source)):
            label = label or type(source).__name__
            memory.keeps_order = True
            module, tensors = describe_module(
                cast("torch.nn.Module", source), label, replaced=replaced, allows_family=not as_class
            )
            specs = _describe_tensors(state_of(tensors), device, memory)
        else:
            label = label or "state_dict"
            state = state_of(source)
            packing = _named_faults(label, lambda: packing_of_tensors(state))
            specs = _describe_tensors(_without(state, packing.markers), device, memory)
        manifest = Manifest(
            kind=kind,
            module=module if acceleration is None else _accelerated(module, acceleration, label),
            label=label,
            blocks=tuple(memory.blocks),
            tensors=tuple(specs),
            packed=packing.packed,
            compute_dtype=_compute_dtype(compute_dtype),
            generation=generation,
        )
        check_manifest(manifest)
    except BaseException as error:
        if isinstance(error, XditdError):
            for line in in_log_lines(error.names):
                logger.info("not lent, names of the error: %s", line)
        traceback.clear_frames(error.__traceback__)  # frames hold views, and an arena with views cannot be freed
        memory.close()
        raise
    return Offer(manifest, memory.copied, {"describe": (time.perf_counter() - started) * 1e3}, memory)


def _compute_dtype(given: str | None) -> ComputeDType | None:
    known = get_args(ComputeDType)
    if given is not None and given not in known:
        raise BadRequest(f"compute_dtype: {given!r}; use {', '.join(map(repr, known))}")
    return cast("ComputeDType | None", given)


def _accelerated(module: ModuleDescription | None, acceleration: str, label: str) -> ModuleDescription:
    known = get_args(Acceleration)
    if acceleration not in known:
        raise BadRequest(f"acceleration: {acceleration!r}; use {', '.join(map(repr, known))}, or None for the daemon's")
    if module is None or module.allows_family:
        raise BadRequest(
            f"{label}: acceleration is of models that run as their class; lend a module or a folder with as_class=True"
        )
    return msgspec.structs.replace(module, acceleration=cast("Acceleration", acceleration))


def _describe_files(
    files: ModelFiles, label: str, device: str | None, memory: _LentMemory
) -> tuple[list[TensorSpec], Packing]:
    opened = [memory.open_file(path) for path in files.paths]
    headers = [read_header(lent) for lent in opened]
    check_shards(files, headers)
    packing = _named_faults(label, lambda: packing_of_files(opened, headers))
    if device is not None:
        if files.description is None:
            stored = {stored.name: stored for header in headers for stored in header.tensors}
            known = form_error(logical_tensors(packing.packed, _without(stored, packing.markers)))
            if known is not None:  # before loading: the workers would fail only after it
                raise named(label, known)
        arena = memory.own_arena(load_into_arena(opened, headers, device))
        memory.notes.append(f"loaded once into an arena of {arena.size_bytes} bytes on {device}")
        return _describe_tensors(_without(arena.tensors, packing.markers), None, memory), packing
    specs = []
    for lent, header in zip(opened, headers, strict=True):
        length = header.length_bytes
        number = memory.block_number(("file", lent.path), lambda lent=lent, length=length: lent.block(length))  # type: ignore[misc]
        specs += [
            TensorSpec(s.name, s.dtype, s.shape, number, s.offset_bytes)
            for s in header.tensors
            if s.name not in packing.markers
        ]
    memory.notes.append(f"file tier: workers map {listed(files.paths)}; nothing is read into this process")
    return specs, packing


def _without(tensors: Mapping[str, T], names: Collection[str]) -> Mapping[str, T]:
    return {name: each for name, each in tensors.items() if name not in names} if names else tensors


def _named_faults(label: str, find: Callable[[], Packing]) -> Packing:
    """Find packed weights; an error begins with the label."""
    try:
        return find()
    except RequestError as error:
        raise named(label, error) from error


def _describe_tensors(tensors: Mapping[str, torch.Tensor], device: str | None, memory: _LentMemory) -> list[TensorSpec]:
    import torch

    if device is not None:
        wanted = device_named(device)
        places = {tensor.device for tensor in tensors.values()}
        if any(place.type != wanted.type or wanted.index not in (None, place.index) for place in places):
            tensors = memory.own_arena(Arena.copy_of(tensors, device, keeps_order=memory.keeps_order)).tensors
            memory.notes.append(f"copied once into an arena on {device}, as device= requests")
    for index in sorted({tensor.device.index for tensor in tensors.values() if tensor.is_cuda}):
        torch.cuda.synchronize(index)  # weights that are still being written must not be exported

    specs: dict[str, TensorSpec] = {}
    to_copy: dict[str, torch.Tensor] = {}
    host_finder = _HostFinder(memory)
    cuda_finder = _CudaFinder(memory)
    for name, tensor in tensors.items():
        if tensor.is_neg():
            spec = None  # its memory holds the negatives of its values
        elif tensor.is_cuda:
            spec = cuda_finder.find(name, tensor)
        elif tensor.device.type == "cpu":
            spec = host_finder.find(name, tensor)
        else:
            raise BadRequest(f"tensor {name} is on device {tensor.device}: only cpu and cuda tensors can be lent")
        if spec is None:
            to_copy[name] = tensor
        else:
            specs[name] = spec
    specs.update(_copy_to_arenas(to_copy, memory))
    return [specs[name] for name in tensors]


class _CudaFinder:
    """Finds the CUDA allocation of each tensor, with one driver call for each allocation instead of each tensor."""

    def __init__(self, memory: _LentMemory) -> None:
        self._memory = memory
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
            # Only this tensor: the memory behind it may belong to another one, and change at any time.
            length = _spec(name, tensor, 0, 0).extent_bytes
            return cuda_ipc.export_allocation(base, whole, tensor.device.index, address - base, length)

        try:
            number = self._memory.block_number(("cuda", tensor.device.index, base), make)
        except cuda_ipc.NotExportable:
            self._unexportable.add(base)
            return None
        self._memory.keep(tensor.untyped_storage())
        return _spec(name, tensor, number, address - base)


class _HostFinder:
    """Finds CPU tensors that are in an arena or are an unwritten slice of a mapped file."""

    def __init__(self, memory: _LentMemory) -> None:
        self._memory = memory
        self._space: AddressSpace | None = None

    def find(self, name: str, tensor: torch.Tensor) -> TensorSpec | None:
        address = tensor.data_ptr()
        arena = host_arena_at(address)
        if arena is not None:
            offset = address - arena.base_address
            number = self._memory.block_number(("arena", arena.base_address), lambda: arena.block(offset))
            self._memory.keep(arena)
            self._memory.keep(tensor.untyped_storage())
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
            lent = self._memory.open_file(mapping.path)
        except BadCheckpoint:
            return None  # it is mapped, but cannot be opened again
        if lent.identity != (mapping.device, mapping.inode):
            return None  # another file got this name before it was opened
        number = self._memory.block_number(("file", mapping.path), lent.block)
        self._memory.keep(tensor.untyped_storage())
        return _spec(name, tensor, number, mapping.offset_of(address))


def _copy_to_arenas(to_copy: Mapping[str, torch.Tensor], memory: _LentMemory) -> dict[str, TensorSpec]:
    """Copy tensors whose memory cannot be shared into one arena for each device."""
    by_device: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in to_copy.items():
        by_device.setdefault(str(tensor.device), {})[name] = tensor
    specs: dict[str, TensorSpec] = {}
    for device, tensors in by_device.items():
        arena = memory.own_arena(Arena.copy_of(tensors, device, keeps_order=memory.keeps_order))
        number = memory.block_number(("arena", arena.base_address), lambda arena=arena: arena.block())  # type: ignore[misc]
        for name, tensor in arena.tensors.items():
            specs[name] = _spec(name, tensor, number, tensor.data_ptr() - arena.base_address if tensor.numel() else 0)
        where = "no file holds them unchanged" if device == "cpu" else "their allocator cannot export memory"
        memory.notes.append(f"{len(tensors)} tensors copied once into an arena on {device}: {where}")
    return specs


def _spec(name: str, tensor: torch.Tensor, block: int, offset_bytes: int) -> TensorSpec:
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return TensorSpec(
        name, dtype_name(tensor.dtype, f"tensor {name}"), tuple(tensor.shape), block, offset_bytes, stride
    )
