"""The inputs and outputs of jobs: tensors in a shared block of the client's."""

from __future__ import annotations

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
"""I/O blocks that stay mapped between jobs, least recently used first out; a client reuses few."""

PROVIDED: Final = 4
"""Blocks of results that stay for each client, newest first: it maps one as soon as it hears of it."""


class JobIo:
    """The clients' I/O blocks that this rank has mapped for reading and writing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: OrderedDict[tuple[ProcessIdentity, int, int], _Mapped] = OrderedDict()
        self._provided: dict[ProcessIdentity, deque[HostArena]] = {}

    def __len__(self) -> int:
        return len(self._mapped)

    def open(self, block: HostShmBlock, exporter: ProcessIdentity) -> OpenIo:
        """Map a client's I/O block, or find it mapped.

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
        """Make a block of this process for results of a client; the newest :data:`PROVIDED` of each stay.

        Raises:
            OutOfMemory: there is no room.
        """
        arena = HostArena(size_bytes, name="xditd-results")
        if self._device.type == "cuda":
            arena.pin(self._device.index)
        blocks = self._provided.setdefault(client, deque())
        blocks.append(arena)
        while len(blocks) > PROVIDED:
            blocks.popleft().close()
        return arena

    def sweep(self) -> None:
        """Unmap every block that its client has closed, as it does after a job of which it cannot be sure.

        Nobody tells: the client's descriptor does, so that a client's thread, session or error path that ends in
        another way leaves nothing behind either.
        """
        for key, mapped in list(self._mapped.items()):
            if not _is_open(key[0], mapped.fd, mapped.mapping.identity):
                self._mapped.pop(key).mapping.close()

    def forget(self, exporter: ProcessIdentity) -> None:
        """Unmap every block of a client that is gone, and free those that were provided for it."""
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
    """The block's descriptor in its client, by the latest job."""


def _is_open(exporter: ProcessIdentity, fd: int, identity: tuple[int, int]) -> bool:
    try:
        found = os.stat(f"/proc/{exporter.pid}/fd/{fd}")
        return (found.st_dev, found.st_ino) == identity
    except OSError:
        return False  # closed, or not ours to look at any more: then it could not be mapped again either


class OpenIo:
    """One job's block. Holds no views between calls, so that it can be unmapped."""

    def __init__(self, mapping: HostMapping) -> None:
        self._mapping = mapping

    def read(
        self, name: str, described: IoTensor, device: torch.device | None = None, *, waits: bool = True
    ) -> torch.Tensor:
        """Copy an input out, to ``device`` or on the host, so that nothing the client writes later changes the job.

        Without ``waits`` the copy may still be under way: the caller waits for the device before the job goes on.

        Raises:
            BadRequest: it does not lie inside the block.
        """
        view = self._view(name, described)  # not converted on the way: that would happen on the host
        return view.clone() if device is None else view.to(device, copy=True, non_blocking=not waits)

    def write(self, name: str, described: IoTensor, value: torch.Tensor) -> None:
        """Copy a result into its place, converted to the dtype that the client asked for.

        Raises:
            BadRequest: the place has another shape, or does not lie inside the block.
        """
        if tuple(value.shape) != described.shape:
            raise BadRequest(
                f"{name}: the place for it is {list(described.shape)}, but the result is {list(value.shape)}"
            )
        view = self._view(name, described)
        # What lies on a GPU is converted there: torch would copy it first, by way of memory that is not pinned, and
        # convert it on the host (aten/src/ATen/native/cuda/Copy.cu, copy_requires_temporaries).
        view.copy_(value.to(view.dtype) if value.is_cuda else value)

    def check(self, name: str, described: IoTensor, shape: tuple[int, ...]) -> None:
        """Check an output's place before the work is done.

        Raises:
            BadRequest: wrong shape, or outside the block.
        """
        if described.shape != shape:
            raise BadRequest(
                f"{name}: the place for it is {list(described.shape)}, but the result will be {list(shape)}"
            )
        self._view(name, described)

    def digest(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Hash a stretch of the block.

        Raises:
            BadRequest: it does not lie inside the block.
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
