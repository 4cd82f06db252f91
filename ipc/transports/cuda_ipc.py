"""Share device memory by CUDA IPC handle: allocations of xditd, and torch's own segments without a copy.

Legacy IPC handles (``cudaIpcGetMemHandle``) name a whole ``cudaMalloc`` allocation. torch's ``_share_cuda_`` is not
used: its reference counters leak when a consumer is killed, and it does not work under ``cudaMallocAsync``, where a raw
allocation can be exported.

Source: CUDA Runtime API, "cudaIpcGetMemHandle", "cudaIpcOpenMemHandle"; CUDA Driver API,
"cuMemGetAddressRange".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from xditd.ipc.errors import Internal, OutOfMemory, StaleSource, Unsupported
from xditd.ipc.tensors import CudaIpcBlock
from xditd.ipc.transports.fingerprints import SAMPLE_BYTES, take_fingerprint
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES, align

if TYPE_CHECKING:
    import torch


class NotExportable(Unsupported):
    """Device memory without an IPC handle: torch's cudaMallocAsync pool or expandable segments."""


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise Unsupported("lending CUDA tensors needs cuda-bindings: pip install 'xditd[cuda]'") from error
    return runtime


def _driver() -> Any:
    _runtime()
    from cuda.bindings import driver

    return driver


def _call(what: str, result: tuple[Any, ...]) -> Any:
    """Unpack a cuda-bindings result; raise if the call failed."""
    status, *values = result
    if int(status) != 0:
        if status.name == "cudaErrorMemoryAllocation":
            _runtime().cudaGetLastError()  # else torch's next call would raise this error
            raise OutOfMemory(f"{what}: {status.name}; free GPU memory or lend from another device")
        raise Internal(f"{what}: {status.name}")
    return values[0] if values else None


def device_uuid(index: int) -> str:
    """Return a GPU's UUID, since ordinals differ between processes."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


class _DeviceBytes:
    """Raw device memory as an object that torch wraps without copying.

    Source: Numba documentation, "CUDA Array Interface (Version 3)".
    """

    def __init__(self, pointer: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def _wrap(pointer: int, size_bytes: int, index: int) -> torch.Tensor:
    import torch

    return torch.as_tensor(_DeviceBytes(pointer, size_bytes), device=torch.device("cuda", index))


class DeviceArena:
    """One raw ``cudaMalloc`` allocation outside torch's allocator, viewed as torch tensors.

    Its size is a multiple of 2 MiB, so the pages that a handle exposes contain nothing else. The arena owns the memory:
    keep it until every loan of it has been returned, then :meth:`close` it.
    """

    def __init__(self, size_bytes: int, index: int) -> None:
        import torch

        self.index = index
        self.size_bytes = align(max(size_bytes, 1), ALLOCATION_BYTES)
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # creates the primary context, which cudaMalloc then uses
            self._pointer = int(_call(f"cudaMalloc of {self.size_bytes} bytes", _runtime().cudaMalloc(self.size_bytes)))
        self.bytes = _wrap(self._pointer, self.size_bytes, index)

    def tensor(self, offset_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a contiguous tensor that views part of the arena."""
        flat = self.bytes.narrow(0, offset_bytes, math.prod(shape) * dtype.itemsize)
        return flat.view(dtype).view(shape)

    def block(self, sample_offset_bytes: int = 0) -> CudaIpcBlock:
        """Describe the arena to other processes, with a fingerprint of its present content."""
        return export_allocation(self._pointer, self.bytes, self.index, sample_offset_bytes)

    def close(self) -> None:
        """Free the memory. Drop every view and return every loan before."""
        if self._pointer:
            import torch

            with torch.cuda.device(self.index):
                torch.cuda.synchronize()  # kernels that still read the arena would fault
                _call("cudaFree", _runtime().cudaFree(self._pointer))
            self._pointer = 0
            del self.bytes


def export_allocation(
    base: int, block: torch.Tensor, index: int, sample_offset_bytes: int = 0, sample_length_bytes: int = SAMPLE_BYTES
) -> CudaIpcBlock:
    """Describe a whole device allocation that starts at ``base``.

    Raises:
        NotExportable: CUDA has no IPC handle for it.
    """
    import torch

    runtime = _runtime()
    with torch.cuda.device(index):
        status, handle = runtime.cudaIpcGetMemHandle(base)
        if int(status) != 0:
            runtime.cudaGetLastError()  # else torch's next call would raise this error
            raise NotExportable(f"device memory at GPU {index}: {status.name}")
        return CudaIpcBlock(
            device_uuid=device_uuid(index),
            handle=bytes(handle.reserved),
            size_bytes=block.numel(),
            fingerprint=take_fingerprint(block, sample_offset_bytes, sample_length_bytes),
        )


def segment_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return base address and size of the allocation that contains a CUDA tensor.

    Raises:
        NotExportable: the driver knows no such allocation.
    """
    import torch

    driver = _driver()
    with torch.cuda.device(tensor.device):  # the driver finds only allocations of the current context
        status, base, size = driver.cuMemGetAddressRange(tensor.untyped_storage().data_ptr())
    if int(status) != 0:
        raise NotExportable(f"device memory of a tensor of shape {tuple(tensor.shape)}: {status.name}")
    return int(base), int(size)


def wrap_segment(base: int, size_bytes: int, index: int) -> torch.Tensor:
    """View a whole allocation of this process as 1-D uint8, without owning it."""
    return _wrap(base, size_bytes, index)


class CudaMapping:
    """Another process's device allocation, opened in this process, which can open a handle only once."""

    def __init__(self, block: CudaIpcBlock, index: int) -> None:
        import torch

        runtime = _runtime()
        handle = runtime.cudaIpcMemHandle_t()
        handle.reserved = block.handle
        self.size_bytes = block.size_bytes
        self._index = index
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # creates the primary context into which the handle is opened
            status, pointer = runtime.cudaIpcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess)
            if int(status) != 0:
                runtime.cudaGetLastError()  # else torch's next call would raise this error
                raise StaleSource(
                    f"CUDA IPC handle of {block.size_bytes} bytes on {block.device_uuid}: {status.name}; its owner has "
                    "exited or freed it, or cannot share memory with this process (containers need --ipc=host); "
                    "lend it again"
                )
        self._pointer = int(pointer)

    def check_size(self) -> None:
        """Check that the mapped allocation has the size that was lent.

        Raises:
            StaleSource: the allocation is smaller, so views would reach beyond it.
        """
        import torch

        with torch.cuda.device(self._index):
            status, _, size = _driver().cuMemGetAddressRange(self._pointer)
        _call("cuMemGetAddressRange", (status,))
        if int(size) < self.size_bytes:
            raise StaleSource(
                f"CUDA IPC handle: {int(size)} bytes are mapped, but {self.size_bytes} were lent; lend it again"
            )

    def bytes_tensor(self) -> torch.Tensor:
        """View the whole mapping as 1-D uint8 on the GPU. Drop every view before :meth:`close`."""
        return _wrap(self._pointer, self.size_bytes, self._index)

    def copy_to(self, target: torch.Tensor, offset_bytes: int) -> None:
        """Copy bytes from an offset on to ``target`` (1-D uint8 on this GPU), asynchronously on the current stream.

        By address, because the mapped memory may be on another GPU, on which torch has no context in this process.
        """
        length_bytes = target.numel()
        assert offset_bytes + length_bytes <= self.size_bytes
        self._copy(target.data_ptr(), self._pointer + offset_bytes, length_bytes)

    def copy_from(self, source: torch.Tensor, offset_bytes: int) -> None:
        """Copy ``source`` (1-D uint8 on this GPU) to an offset, asynchronously on the current stream.

        By address, as :meth:`copy_to`.
        """
        length_bytes = source.numel()
        assert offset_bytes + length_bytes <= self.size_bytes
        self._copy(self._pointer + offset_bytes, source.data_ptr(), length_bytes)

    def _copy(self, target: int, source: int, length_bytes: int) -> None:
        import torch

        runtime = _runtime()
        with torch.cuda.device(self._index):
            _call(
                f"cudaMemcpyAsync of {length_bytes} bytes",
                runtime.cudaMemcpyAsync(
                    target,
                    source,
                    length_bytes,
                    runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
                    torch.cuda.current_stream().cuda_stream,
                ),
            )

    def close(self) -> None:
        """Wait for the kernels that read the mapping, and close the handle."""
        if self._pointer:
            import torch

            with torch.cuda.device(self._index):
                torch.cuda.synchronize()  # a kernel that still reads the mapping would fault
                _call("cudaIpcCloseMemHandle", _runtime().cudaIpcCloseMemHandle(self._pointer))
            self._pointer = 0
