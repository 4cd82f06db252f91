"""Arenas: memory that holds all tensors of a component in one block, ready to be lent without a copy."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from xditd.ipc.errors import BadRequest, Closed, Unsupported
from xditd.ipc.tensors import CopiedBytes, CudaIpcBlock, HostShmBlock
from xditd.ipc.transports.cuda_ipc import DeviceArena
from xditd.ipc.transports.host_shm import HostArena
from xditd.ipc.transports.tensor_views import dtype_name, place
from xditd.ipc.transports.uploads import can_upload, upload

if TYPE_CHECKING:
    import torch

_live: dict[int, weakref.ref[Arena]] = {}
"""Arenas by ``id``. Every access is one step of the interpreter: threads need no lock, and a fork finds none held."""


class Arena:
    """All tensors of a component in one allocation, on the host or on one GPU.

    ``Client.lend(arena.tensors)`` then shares them as they are: one handle, no copy. What is written
    into ``arena.tensors`` is what the workers read, at once; write between jobs only.

    The arena owns the memory. Keep it until the loan has been returned, then call :meth:`close`, which
    drops ``tensors``; views that you keep elsewhere must be gone by then.
    """

    def __init__(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: str = "cpu") -> None:
        """Allocate uninitialised tensors of these dtypes and shapes on ``cpu``, ``cuda`` or ``cuda:N``.

        Raises:
            OutOfMemory: the device has no room.
            BadRequest: a negative side.
            UnsupportedDtype: a dtype that cannot cross.
            Unsupported: a device of another kind, or one that is not there, or cuda-bindings is missing.
        """
        import torch

        where = device_named(device)
        sizes = []
        for name, (dtype, shape) in shapes.items():
            dtype_name(dtype, f"tensor {name}")  # refuses what cannot cross, before anything is allocated
            count = 1
            for side in shape:
                if side < 0:
                    raise BadRequest(f"tensor {name} of an arena has the shape {list(shape)}: a side is negative")
                count *= side
            sizes.append(count * dtype.itemsize)
        offsets, total = place(sizes)
        self._memory: HostArena | DeviceArena
        self.tensors: dict[str, torch.Tensor] = {}
        layout = zip(shapes.items(), offsets, strict=True)
        if where.type == "cpu":
            host = HostArena(total)
            self.tensors = {name: host.tensor(at, dtype_name(dtype), shape) for (name, (dtype, shape)), at in layout}
            self.base_address = host.tensor(0, "uint8", (host.size_bytes,)).data_ptr()
            self._memory = host
        else:
            gpu = DeviceArena(total, torch.cuda.current_device() if where.index is None else where.index)
            self.tensors = {name: gpu.tensor(at, dtype, shape) for (name, (dtype, shape)), at in layout}
            self.base_address = gpu.bytes.data_ptr()
            self._memory = gpu
        self._is_closed = False
        self.copied = CopiedBytes()
        self.fill_ms = 0.0
        key = id(self)
        _live[key] = weakref.ref(self, lambda _: _live.pop(key, None))

    @classmethod
    def copy_of(cls, tensors: Mapping[str, torch.Tensor], device: str = "cpu") -> Arena:
        """Make an arena and copy tensors into it; ``copied`` then counts the bytes by kind."""
        import torch

        arena = cls({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, device)
        started = time.perf_counter()
        moved = {"cpu": 0, "cuda": 0}
        try:
            for name in arena.fill(tensors):
                moved[tensors[name].device.type] += tensors[name].nbytes
            if isinstance(arena._memory, DeviceArena):
                torch.cuda.synchronize(arena._memory.index)  # the copies must have landed before a handle is given away
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
        """Copy tensors into those of the same names, and yield each name once its values are there.

        On a GPU that is so for work issued on the current stream; other tensors are copied meanwhile.

        Raises:
            Closed: the arena is closed.
        """
        self._check_open()
        import torch

        uploads = [name for name, tensor in tensors.items() if can_upload(tensor, self.tensors[name])]
        for number in upload([(tensors[name].detach(), self.tensors[name]) for name in uploads]):
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
            Internal: a tensor that views a host arena is still alive.
        """
        _live.pop(id(self), None)
        self.tensors.clear()
        self._memory.close()
        self._is_closed = True

    def __repr__(self) -> str:
        where = f"GPU {self._memory.index}" if isinstance(self._memory, DeviceArena) else "the host"
        held = "closed" if self._is_closed else f"{len(self.tensors)} tensors"
        return f"<Arena on {where}, {self.size_bytes} bytes, {held}>"

    def _check_open(self) -> None:
        if self._is_closed:
            raise Closed(f"arena of {self.size_bytes} bytes: it is closed, and its memory freed; make a new Arena")


def host_arena_at(address: int) -> Arena | None:
    """Find the live host arena that an address lies in."""
    for reference in list(_live.values()):
        arena = reference()
        if arena is None or not arena.base_address <= address < arena.base_address + arena.size_bytes:
            continue
        if isinstance(arena._memory, HostArena):
            return arena
    return None


def device_named(device: str) -> torch.device:
    """Find the device that an arena is wanted on.

    Raises:
        Unsupported: no such device, or one whose memory cannot be shared.
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
