"""Arenas: one allocation that holds all tensors of a component, so that it can be lent without a copy."""

from __future__ import annotations

import math
import operator
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc.errors import BadRequest, Closed, Unsupported
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import CopiedBytes, CudaIpcBlock, HostShmBlock
from xditd.ipc.transports.cuda_ipc import DeviceArena
from xditd.ipc.transports.host_shm import HostArena
from xditd.ipc.transports.tensor_views import dtype_name, inverse_order, memory_order, place
from xditd.ipc.transports.uploads import can_upload, upload

if TYPE_CHECKING:
    import torch

_live: dict[int, weakref.ref[Arena]] = {}
"""Arenas by ``id``. Every access is atomic under the GIL, so there is no lock that a fork could inherit locked."""


class Arena:
    """All tensors of a component in one allocation, on the host or on one GPU.

    ``Client.lend(arena.tensors)`` shares them without a copy, by one handle. The workers read at once what is
    written into ``arena.tensors``; write between jobs only.

    The arena owns the memory. Keep it until the loan is returned, then delete all views that you hold and call
    :meth:`close`, which clears ``tensors``.
    """

    def __init__(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: str = "cpu") -> None:
        """Allocate uninitialised tensors of these dtypes and shapes on ``cpu``, ``cuda`` or ``cuda:N``.

        Raises:
            OutOfMemory: the device has too little free memory.
            BadRequest: no pairs of a dtype and a shape by name, or a shape with a negative size.
            UnsupportedDtype: a dtype that cannot be sent to the workers.
            Unsupported: a device of another kind, one that does not exist, or cuda-bindings is not installed.
        """
        import torch

        where = device_named(device)
        sizes = []
        if not isinstance(shapes, Mapping):
            raise BadRequest(f"arena: {shapes!r:.100} is of type {type(shapes).__name__}; give {_PAIRS}")
        for name, pair in shapes.items():
            dtype, shape = _checked_pair(name, pair)
            dtype_name(dtype, f"tensor {name}")  # raises UnsupportedDtype before anything is allocated
            sizes.append(math.prod(shape) * dtype.itemsize)
        offsets, total = place(sizes)
        self._memory: HostArena | DeviceArena
        self.tensors: dict[str, torch.Tensor] = {}
        placed = zip(shapes.items(), offsets, strict=True)
        if where.type == "cpu":
            host = HostArena(total)
            self.tensors = {name: host.tensor(at, dtype_name(dtype), shape) for (name, (dtype, shape)), at in placed}
            self.base_address = host.tensor(0, "uint8", (host.size_bytes,)).data_ptr()
            self._memory = host
        else:
            gpu = DeviceArena(total, torch.cuda.current_device() if where.index is None else where.index)
            self.tensors = {name: gpu.tensor(at, dtype, shape) for (name, (dtype, shape)), at in placed}
            self.base_address = gpu.bytes.data_ptr()
            self._memory = gpu
        self._is_closed = False
        self.copied = CopiedBytes()
        self.fill_ms = 0.0
        key = id(self)
        _live[key] = weakref.ref(self, lambda _: _live.pop(key, None))

    @classmethod
    def copy_of(cls, tensors: Mapping[str, torch.Tensor], device: str = "cpu", *, keeps_order: bool = False) -> Arena:
        """Create an arena and copy tensors into it; ``copied`` counts the bytes by kind of copy.

        With ``keeps_order`` the dimensions of each tensor have the order in memory that they had, such as channels
        last; without it they are contiguous.
        """
        import torch

        _check_tensors(tensors)
        orders = {name: memory_order(tensor) if keeps_order else None for name, tensor in tensors.items()}
        in_memory = {
            name: tensor if (order := orders[name]) is None else tensor.permute(order)
            for name, tensor in tensors.items()
        }
        arena = cls({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in in_memory.items()}, device)
        for name, order in orders.items():
            if order is not None:
                arena.tensors[name] = arena.tensors[name].permute(inverse_order(order))
        started = time.perf_counter()
        moved = {"cpu": 0, "cuda": 0}
        try:
            for name in arena.fill(tensors):
                moved[tensors[name].device.type] += tensors[name].nbytes
            if isinstance(arena._memory, DeviceArena):
                torch.cuda.synchronize(arena._memory.index)  # the copies must be complete before a handle is exported
        except BaseException:
            arena.close()
            raise
        if isinstance(arena._memory, DeviceArena):
            arena.copied = CopiedBytes(host_to_device=moved["cpu"], device_to_device=moved["cuda"])
        else:
            arena.copied = CopiedBytes(host_to_host=moved["cpu"] + moved["cuda"])
        arena.fill_ms = (time.perf_counter() - started) * 1e3
        return arena

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """Copy tensors into the arena's tensors of the same names, and yield each name when its copy is complete.

        On a GPU, complete means complete for work on the current stream; other copies continue.

        Raises:
            Closed: the arena is closed.
            BadRequest: what is no tensor, has no place of its name and shape here, or is complex where that is real.
        """
        self._check_open()
        import torch

        _check_tensors(tensors)
        for name, tensor in tensors.items():
            self._check_place(name, tensor)
        uploads = [name for name, tensor in tensors.items() if can_upload(tensor, self.tensors[name])]
        with upload([(tensors[name].detach(), self.tensors[name]) for name in uploads]) as copied:
            for number in copied:
                yield uploads[number]
        uploaded = set(uploads)
        for name in [name for name in tensors if name not in uploaded]:
            with torch.no_grad():
                self.tensors[name].copy_(tensors[name])
            yield name

    @property
    def size_bytes(self) -> int:
        return self._memory.size_bytes

    def block(self, sample_offset_bytes: int = 0) -> HostShmBlock | CudaIpcBlock:
        """Describe the arena to other processes.

        Raises:
            Closed: the arena is closed.
        """
        self._check_open()
        return self._memory.block(sample_offset_bytes)

    def close(self) -> None:
        """Free the memory.

        Raises:
            Internal: a view of a host arena still exists.
        """
        _live.pop(id(self), None)
        self.tensors.clear()
        self._memory.close()
        self._is_closed = True

    def __repr__(self) -> str:
        where = f"GPU {self._memory.index}" if isinstance(self._memory, DeviceArena) else "the host"
        held = "closed" if self._is_closed else f"{len(self.tensors)} tensors"
        return f"<Arena on {where}, {self.size_bytes} bytes, {held}>"

    def _check_place(self, name: str, tensor: torch.Tensor) -> None:
        place = self.tensors.get(name)
        if place is None:
            raise BadRequest(f"tensor {name!s:.100} has no place in the arena; it has {listed(self.tensors)}")
        if place.shape != tensor.shape or (tensor.is_complex() and not place.is_complex()):
            raise BadRequest(
                f"tensor {name}: {tensor.dtype} {list(tensor.shape)} for the arena's {place.dtype} "
                f"{list(place.shape)}; give one of this shape, and a real one for a real one"
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise Closed(f"arena of {self.size_bytes} bytes: it is closed and its memory is freed; make a new Arena")


_PAIRS: Final = "a dtype and a shape by name, such as {'weight': (torch.float16, (64, 64))}"


def _checked_pair(name: object, pair: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    import torch

    try:
        dtype, shape = pair
        sides = tuple(operator.index(side) for side in shape)
    except (TypeError, ValueError):
        dtype, sides = None, ()
    if not isinstance(dtype, torch.dtype):
        raise BadRequest(f"tensor {name!s:.100} of an arena: {pair!r:.100}; give {_PAIRS}")
    if any(side < 0 for side in sides):
        raise BadRequest(f"tensor {name} of an arena has the shape {list(sides)}: a side is negative")
    return dtype, sides


def _check_tensors(tensors: Any) -> None:
    import torch

    if not isinstance(tensors, Mapping):
        raise BadRequest(f"arena: {tensors!r:.100} is of type {type(tensors).__name__}; give a dict of tensors by name")
    for name, each in tensors.items():
        if not isinstance(each, torch.Tensor):
            raise BadRequest(f"{name!s:.100} is a {type(each).__name__}, not a tensor: leave it out of the arena")


def host_arena_at(address: int) -> Arena | None:
    """Find the open host arena that contains an address."""
    for reference in list(_live.values()):
        arena = reference()
        if arena is None or not arena.base_address <= address < arena.base_address + arena.size_bytes:
            continue
        if isinstance(arena._memory, HostArena):
            return arena
    return None


def device_named(device: str) -> torch.device:
    """Parse the name of an arena's device.

    Raises:
        Unsupported: the device does not exist, or its memory cannot be shared.
    """
    import torch

    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise Unsupported(f"arena on device {device!r}: torch knows no such device") from error
    if where.type not in ("cpu", "cuda"):
        raise Unsupported(f"arena on device {device!r}: only cpu and cuda devices can be shared")
    count = torch.cuda.device_count() if where.type == "cuda" else 1
    if not count:
        raise Unsupported(f"arena on device {device!r}: torch {torch.__version__} sees no GPU here")
    if where.type == "cuda" and where.index is not None and where.index >= count:
        raise Unsupported(f"arena on device {device!r}: torch sees {count} GPUs, numbered from 0")
    return where
