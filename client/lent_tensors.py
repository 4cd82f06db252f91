"""Find the memory of tensors: for each the first tier that needs no copy (``lending`` has the table)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from xditd.client.arenas import Arena, device_named, host_arena_at
from xditd.client.file_mappings import AddressSpace
from xditd.client.lent_memory import LentMemory
from xditd.ipc.errors import BadCheckpoint, BadRequest
from xditd.ipc.tensors import Block, TensorSpec
from xditd.ipc.transports import cuda_ipc
from xditd.ipc.transports.tensor_views import dtype_name, memory_order

if TYPE_CHECKING:
    import torch


def describe_tensors(tensors: Mapping[str, torch.Tensor], device: str | None, memory: LentMemory) -> list[TensorSpec]:
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
        if tensor.is_neg() or tensor.is_conj():
            spec = None  # its memory holds the negatives of its values, or their conjugates
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

    def __init__(self, memory: LentMemory) -> None:
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

    def __init__(self, memory: LentMemory) -> None:
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


def _copy_to_arenas(to_copy: Mapping[str, torch.Tensor], memory: LentMemory) -> dict[str, TensorSpec]:
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
    is_in_order = tensor.is_contiguous() and memory_order(tensor) is None
    stride = None if is_in_order else tuple(tensor.stride())
    return TensorSpec(
        name, dtype_name(tensor.dtype, f"tensor {name}"), tuple(tensor.shape), block, offset_bytes, stride
    )
