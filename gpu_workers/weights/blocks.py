"""Map lent blocks: the memory of other processes as 1-D uint8 tensors, each mapped once."""

from __future__ import annotations

import traceback
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from xditd.ipc.errors import ForeignGpu, Internal, StaleSource
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import Block, CudaIpcBlock, FileBlock
from xditd.ipc.transports.cuda_ipc import CudaMapping
from xditd.ipc.transports.file import FileMapping, map_file
from xditd.ipc.transports.file_state import FileState
from xditd.ipc.transports.fingerprints import check_fingerprint
from xditd.ipc.transports.host_shm import HostMapping, map_shm

Key = tuple[ProcessIdentity, Hashable]


@dataclass
class OpenBlock:
    """One mapped block. ``bytes`` lives on the block's own device: the GPU of the handle, or the host."""

    key: Key
    mapping: CudaMapping | FileMapping | HostMapping
    bytes: torch.Tensor
    users: int = 0

    def check_unchanged(self) -> None:
        """Raise ``StaleSource`` if this is a file that changed since it was lent."""
        if isinstance(self.mapping, FileMapping):
            self.mapping.check_unchanged()


class OpenBlocks:
    """The blocks that this rank has mapped, with use counts: components may share one, and a CUDA handle opens once."""

    def __init__(self, device: torch.device, device_uuid: str) -> None:
        self._device = device
        self._device_uuid = device_uuid
        self._open: dict[Key, OpenBlock] = {}

    def __len__(self) -> int:
        return len(self._open)

    def is_local(self, block: Block) -> bool:
        """Return whether this rank can map the block: any host memory, device memory of its own GPU."""
        return not isinstance(block, CudaIpcBlock) or block.device_uuid == self._device_uuid

    def acquire(self, block: Block, exporter: ProcessIdentity, digest: bytes | None = None) -> OpenBlock:
        """Map a block, or count another user of it, and check that it holds the bytes that were lent.

        ``digest`` is that of a file's bytes, if known. Pair every call with :meth:`release`, and drop all views of
        ``bytes`` before.

        Raises:
            ForeignGpu: device memory of a GPU that is not this rank's.
            ProcessGone, StaleSource, NotPermitted: see the transports.
        """
        if not self.is_local(block):
            raise ForeignGpu(f"device memory on GPU {block.device_uuid}: this rank's GPU is {self._device_uuid}")  # type: ignore[union-attr]
        key = (exporter, _identity(block))
        found = self._open.get(key)
        if found is None:
            found = self._map(key, block, exporter, digest)
        elif found.bytes.numel() != block.size_bytes:  # tensors were checked against the described size
            raise StaleSource(
                f"{_name(block, exporter)}: {found.bytes.numel()} bytes are mapped, but {block.size_bytes} were lent; "
                "lend it again"
            )
        try:
            check_fingerprint(found.bytes, block.fingerprint, _name(block, exporter))
        except BaseException as error:
            if not found.users:
                # The frames hold views, and a block with views cannot be unmapped.
                traceback.clear_frames(error.__traceback__)
                self._close(found)
            raise
        self._open[key] = found
        found.users += 1
        return found

    def release(self, opened: OpenBlock) -> None:
        """Drop one use; the last release unmaps the block.

        Raises:
            Internal: a view of the block is still alive, or it was not open.
        """
        if self._open.get(opened.key) is not opened:
            raise Internal("a block was released more often than it was acquired")
        opened.users -= 1
        if not opened.users:
            del self._open[opened.key]
            self._close(opened)

    def _map(self, key: Key, block: Block, exporter: ProcessIdentity, digest: bytes | None) -> OpenBlock:
        if isinstance(block, CudaIpcBlock):
            mapping = CudaMapping(block, self._device.index)
            try:
                mapping.check_size()
            except BaseException:
                mapping.close()
                raise
            return OpenBlock(key, mapping, mapping.bytes_tensor())
        host = map_file(block, exporter, digest) if isinstance(block, FileBlock) else map_shm(block, exporter)
        return OpenBlock(key, host, host.bytes_tensor())

    @staticmethod
    def _close(opened: OpenBlock) -> None:
        del opened.bytes
        opened.mapping.close()


def _identity(block: Block) -> Hashable:
    if isinstance(block, CudaIpcBlock):
        return block.handle
    if isinstance(block, FileBlock):
        return FileState.of_block(block)
    return block.inode


def _name(block: Block, exporter: ProcessIdentity) -> str:
    if isinstance(block, CudaIpcBlock):
        return f"device memory of process {exporter.pid} on GPU {block.device_uuid}"
    return block.path if isinstance(block, FileBlock) else f"shared memory of process {exporter.pid}"
