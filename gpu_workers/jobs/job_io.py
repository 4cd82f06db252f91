"""Read and write the tensors of jobs in shared memory (the client's I/O block)."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

import torch

from xditd.ipc.errors import BadRequest
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import HostShmBlock, IoTensor, TensorSpec
from xditd.ipc.transports.fingerprints import digest_bytes, sample_bytes
from xditd.ipc.transports.host_shm import HostArena, HostMapping, map_shm
from xditd.ipc.transports.tensor_views import VIEW_ALIGNMENT_BYTES, BlockViews

_MAX_MAPPED: Final = 16
"""How many I/O blocks stay mapped between jobs; the least recently used is unmapped first."""

PROVIDED_PER_CLIENT: Final = 4
"""How many blocks of results stay for each client; the oldest is freed first. A client maps a block at once."""


class JobIo:
    """The I/O blocks of all clients that this rank has mapped, and the blocks of results that it has made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: OrderedDict[tuple[ProcessIdentity, int, int], _Mapped] = OrderedDict()
        self._provided: dict[ProcessIdentity, deque[HostArena]] = {}

    def __len__(self) -> int:
        return len(self._mapped)

    def open(self, block: HostShmBlock, exporter: ProcessIdentity) -> OpenIo:
        """Return a client's I/O block, mapped now or by an earlier job.

        Raises:
            ProcessGone, StaleSource, NotPermitted: see :func:`map_shm`.
        """
        key = (exporter, block.inode, block.size_bytes)
        mapped = self._mapped.get(key)
        if mapped is None:
            mapped = self._mapped[key] = _Mapped(map_shm(block, exporter, is_writable=True), block.fd)
            if self._device.type == "cuda":
                mapped.mapping.pin(self._device.index)
            while len(self._mapped) > _MAX_MAPPED:
                self._mapped.popitem(last=False)[1].mapping.close()
        mapped.fd = block.fd
        self._mapped.move_to_end(key)
        return OpenIo(mapped.mapping)

    def provide(self, client: ProcessIdentity, size_bytes: int) -> HostArena:
        """Make a block of this process for a client's results; its newest :data:`PROVIDED_PER_CLIENT` stay.

        Raises:
            OutOfMemory: there is no memory.
        """
        arena = HostArena(size_bytes, name="xditd-results")
        if self._device.type == "cuda":
            arena.pin(self._device.index)
        blocks = self._provided.setdefault(client, deque())
        blocks.append(arena)
        while len(blocks) > PROVIDED_PER_CLIENT:
            blocks.popleft().close()
        return arena

    def unmap_closed(self) -> None:
        """Unmap every block whose client has closed its descriptor.

        No message announces that, so that nothing leaks however a client's thread or session ends.
        """
        for key, mapped in list(self._mapped.items()):
            if not _has_descriptor(key[0], mapped.fd, mapped.mapping.identity):
                self._mapped.pop(key).mapping.close()

    def forget(self, exporter: ProcessIdentity) -> None:
        """Unmap the I/O blocks of a client that has exited, and free the blocks of its results."""
        for key in [key for key in self._mapped if key[0] == exporter]:
            self._mapped.pop(key).mapping.close()
        for arena in self._provided.pop(exporter, ()):
            arena.close()

    def close(self) -> None:
        while self._mapped:
            self._mapped.popitem()[1].mapping.close()
        for client in list(self._provided):
            self.forget(client)


@dataclass
class _Mapped:
    mapping: HostMapping
    fd: int
    """The block's descriptor in the client, from the latest job."""


def _has_descriptor(exporter: ProcessIdentity, fd: int, identity: tuple[int, int]) -> bool:
    try:
        found = os.stat(f"/proc/{exporter.pid}/fd/{fd}")
        return (found.st_dev, found.st_ino) == identity
    except OSError:
        return False  # closed, or no longer readable: then it could not be mapped again, either


class OpenIo:
    """The I/O block of one job. Holds no views, so that it can be unmapped."""

    def __init__(self, mapping: HostMapping) -> None:
        self._mapping = mapping

    def read(
        self, name: str, described: IoTensor, device: torch.device | None = None, *, waits: bool = True
    ) -> torch.Tensor:
        """Copy an input to ``device`` (or on the host), so that later writes of the client change nothing.

        Without ``waits`` the copy is asynchronous, and the caller has to wait for the device before the job goes on.

        Raises:
            BadRequest: it is not inside the block.
        """
        view = self._view(name, described)  # not converted here: torch would do that on the host
        return view.clone() if device is None else view.to(device, copy=True, non_blocking=not waits)

    def write(self, name: str, described: IoTensor, value: torch.Tensor, *, waits: bool = True) -> None:
        """Copy a result into its place, converted to the client's dtype.

        Without ``waits`` the copy from a GPU is in the order of its stream, for which the caller has to wait.

        Raises:
            BadRequest: the place has another shape, or is not inside the block.
        """
        if tuple(value.shape) != described.shape:
            raise BadRequest(
                f"{name}: the place for it is {list(described.shape)}, but the result is {list(value.shape)}"
            )
        view = self._view(name, described)
        # Convert on the GPU: else torch copies first, through memory that is not pinned, and converts on the host
        # (aten/src/ATen/native/cuda/Copy.cu, copy_requires_temporaries).
        view.copy_(value.to(view.dtype) if value.is_cuda else value, non_blocking=not waits)

    def write_part(self, described: IoTensor, dimension: int, start: int, part: torch.Tensor) -> None:
        """Begin to copy a part of a result, from ``start`` along a dimension, into a place that was checked.

        The copy from a GPU is in the order of its stream, for which the caller has to wait.
        """
        view = self._view("", described).narrow(dimension, start, part.shape[dimension])
        if part.is_cuda:
            part = part.to(view.dtype).contiguous()
        # Piece by piece, each of which is one range of memory: torch copies others from a GPU through memory that is
        # not pinned, and the host waits.
        for index in itertools.product(*map(range, part.shape[:dimension])):
            view[index].copy_(part[index], non_blocking=True)

    def check(self, name: str, described: IoTensor, shape: tuple[int, ...]) -> None:
        """Check the place of an output before the job runs.

        Raises:
            BadRequest: it has another shape, or is not inside the block.
        """
        if described.shape != shape:
            raise BadRequest(
                f"{name}: the place for it is {list(described.shape)}, but the result will be {list(shape)}"
            )
        self._view(name, described)

    def digest(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Hash a range of the block.

        Raises:
            BadRequest: it is not inside the block.
        """
        if offset_bytes + length_bytes > self._mapping.size_bytes:
            raise BadRequest(f"memory check ends at byte {offset_bytes + length_bytes} of {self._mapping.size_bytes}")
        return digest_bytes(sample_bytes(self._mapping.bytes_tensor(), offset_bytes, length_bytes))

    def _view(self, name: str, described: IoTensor) -> torch.Tensor:
        end = described.offset_bytes + described.size_bytes
        if end > self._mapping.size_bytes:
            raise BadRequest(f"{name}: ends at byte {end} of an I/O block of {self._mapping.size_bytes}")
        if described.offset_bytes % VIEW_ALIGNMENT_BYTES:
            raise BadRequest(
                f"{name}: starts at byte {described.offset_bytes}, not a multiple of {VIEW_ALIGNMENT_BYTES}"
            )
        spec = TensorSpec(name, described.dtype, described.shape, 0, described.offset_bytes)
        return BlockViews(self._mapping.bytes_tensor()).view(spec)
