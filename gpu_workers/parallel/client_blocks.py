"""Clients' blocks of device memory, which carry the large tensors of their calls: each rank copies them once.

The rank on the client's GPU maps the block. With peer access between all ranks the others map it too; otherwise the
first one broadcasts the inputs. Arguments are copied out of a block, never used in place: no forward can write to
the client's memory, and no tensor that a worker keeps refers to it.
"""

from __future__ import annotations

import logging
import traceback
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist

from xditd.gpu_workers.parallel.gpu_copies import GpuCopies
from xditd.gpu_workers.parallel.rank_sync import agree, raise_on_all_ranks
from xditd.ipc.errors import BadRequest, ForeignGpu, StaleSource, XditdError
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import CudaIpcBlock, IoTensor
from xditd.ipc.transports.cuda_ipc import CudaMapping
from xditd.ipc.transports.fingerprints import SAMPLE_BYTES, check_fingerprint
from xditd.ipc.transports.tensor_views import torch_dtype

logger = logging.getLogger(__name__)

MAX_MAPPED: Final = 8
"""How many blocks stay mapped between jobs; the least recently used is unmapped first."""

_Key = tuple[ProcessIdentity, bytes]
"""The exporter, and the digest of the block's fingerprint, which differs for each block."""


@dataclass(frozen=True)
class _Mapped:
    block: CudaIpcBlock
    owner: int
    """The rank on the client's GPU."""
    mapping: CudaMapping | None
    """``None`` on a rank that gets the inputs by broadcast."""
    is_broadcast: bool
    """The same on all ranks."""

    def close(self) -> None:
        if self.mapping is not None:
            self.mapping.close()


class ClientBlocks:
    """The blocks of device memory of all clients that this rank has mapped.

    Every rank makes the same calls in the same order, so all have the same blocks open.
    """

    def __init__(self, copies: GpuCopies) -> None:
        self._copies = copies
        self._mapped: OrderedDict[_Key, _Mapped] = OrderedDict()

    def __len__(self) -> int:
        return len(self._mapped)

    def open(self, block: CudaIpcBlock, exporter: ProcessIdentity, inputs_end_bytes: int) -> OpenClientBlock:
        """Return a block for one job, mapped now or by an earlier one; all ranks call this together.

        All inputs are in its first ``inputs_end_bytes``.

        Raises:
            ForeignGpu: no rank's GPU is the client's.
            StaleSource: the handle cannot be opened, or leads to other memory than was described.
            BadRequest: the inputs end outside the block, or its fingerprint is not of its first 4 KiB.
            OtherRankFailed, OutOfMemory: another rank failed, or there is no room for a broadcast.
        """
        _check_described(block, inputs_end_bytes, self._copies.peer_uuids)
        key = exporter, block.fingerprint.digest
        found = self._mapped.get(key)
        if found is None:
            found = self._mapped[key] = self._map(block)
            while len(self._mapped) > MAX_MAPPED:
                self._mapped.popitem(last=False)[1].close()
        elif found.block != block:
            raise StaleSource(f"{_name(block)}: its fingerprint is that of another block of the same process")
        self._mapped.move_to_end(key)
        staged = self._broadcast(found, inputs_end_bytes) if found.is_broadcast and inputs_end_bytes else None
        return OpenClientBlock(found.mapping, staged, block.size_bytes, self._copies.device)

    def unmap(self, exporter: ProcessIdentity, digests: Collection[bytes]) -> None:
        """Unmap blocks that a client drops. An unknown one is no error: its worker may have ended."""
        for digest in digests:
            dropped = self._mapped.pop((exporter, digest), None)
            if dropped is not None:
                dropped.close()

    def forget(self, exporter: ProcessIdentity) -> None:
        """Unmap all blocks of a client."""
        self.unmap(exporter, [digest for process, digest in self._mapped if process == exporter])

    def close(self) -> None:
        """Unmap all blocks."""
        while self._mapped:
            self._mapped.popitem()[1].close()

    def _map(self, block: CudaIpcBlock) -> _Mapped:
        # A handle can be that of a freed block whose address was allocated again. A process can open it only once.
        for key in [key for key, each in self._mapped.items() if each.block.handle == block.handle]:
            self._mapped.pop(key).close()
        copies = self._copies
        owner = copies.peer_uuids.index(block.device_uuid)
        mapping: CudaMapping | None = None
        with raise_on_all_ranks():
            if copies.rank == owner:
                mapping = self._open(block, is_own=True)
        if copies.ranks == 1:
            return _Mapped(block, owner, mapping, is_broadcast=False)
        if copies.is_direct and copies.rank != owner:
            try:
                mapping = self._open(block, is_own=False)
            except XditdError as error:  # the other ranks wait in agree()
                logger.warning("no peer copy, inputs are broadcast reason=%s", error.detail)
        is_direct = copies.is_direct and agree(mapping is not None)
        return _Mapped(block, owner, mapping, is_broadcast=not is_direct)

    def _open(self, block: CudaIpcBlock, *, is_own: bool) -> CudaMapping:
        mapping = CudaMapping(block, self._copies.device.index)
        try:
            if is_own:
                mapping.check_size()
            sample = block.fingerprint
            seen = torch.zeros(sample.offset_bytes + sample.length_bytes, dtype=torch.uint8, device=self._copies.device)
            mapping.copy_to(seen, 0)
            check_fingerprint(seen, sample, _name(block))
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            mapping.close()
            raise StaleSource(f"{_name(block)}: the worker has no memory to check it") from error
        except BaseException:
            mapping.close()
            raise
        return mapping

    def _broadcast(self, found: _Mapped, length_bytes: int) -> torch.Tensor:
        """Return the first bytes of a block on every rank; all ranks call this together."""
        with raise_on_all_ranks():
            staged = torch.empty(length_bytes, dtype=torch.uint8, device=self._copies.device)
            if self._copies.rank == found.owner:
                assert found.mapping is not None
                found.mapping.copy_to(staged, 0)
        dist.broadcast(staged, src=found.owner)
        return staged


class OpenClientBlock:
    """A client's block of device memory, for one job. Holds no views, so that it can be unmapped."""

    def __init__(
        self, mapping: CudaMapping | None, staged: torch.Tensor | None, size_bytes: int, device: torch.device
    ) -> None:
        self._mapping = mapping
        self._staged = staged
        self._size_bytes = size_bytes
        self._device = device

    @property
    def can_write(self) -> bool:
        """Whether this rank can write results to the client's GPU."""
        return self._mapping is not None

    def read(self, name: str, place: IoTensor) -> torch.Tensor:
        """Begin to copy an input to this rank's GPU, in the order of the current stream.

        Wait for the stream before the client may write to its block again.

        Raises:
            BadRequest: it is not inside the block.
        """
        end = self._check(name, place)
        found = torch.empty(place.size_bytes, dtype=torch.uint8, device=self._device)
        if found.numel():
            if self._staged is not None:
                found.copy_(self._staged[place.offset_bytes : end])
            else:
                assert self._mapping is not None
                self._mapping.copy_to(found, place.offset_bytes)
        return found.view(torch_dtype(place.dtype)).view(place.shape)

    def write(self, name: str, place: IoTensor, value: torch.Tensor) -> None:
        """Begin to copy a result of the place's dtype and shape, in the order of the current stream.

        Raises:
            BadRequest: the place is not inside the block.
        """
        self._check(name, place)
        if value.numel():
            assert self._mapping is not None
            plain = value.resolve_conj().resolve_neg().contiguous()
            self._mapping.copy_from(plain.view(-1).view(torch.uint8), place.offset_bytes)

    def drop_inputs(self) -> None:
        """Free what a broadcast of the inputs took on this rank, when all are read."""
        self._staged = None

    def _check(self, name: str, place: IoTensor) -> int:
        end = place.offset_bytes + place.size_bytes
        if end > self._size_bytes:
            raise BadRequest(f"{name}: ends at byte {end} of a block of device memory of {self._size_bytes}")
        return end


def _check_described(block: CudaIpcBlock, inputs_end_bytes: int, uuids: tuple[str, ...]) -> None:
    """Check what the message says, with the same result on all ranks; see :meth:`ClientBlocks.open` for the errors."""
    if block.device_uuid not in uuids:
        own = ", ".join(uuid for uuid in uuids if uuid) or "none, they run on the CPU"
        raise ForeignGpu(f"{_name(block)}: the workers' GPUs are {own}; send its tensors through host memory")
    sample = block.fingerprint
    sample_end = sample.offset_bytes + sample.length_bytes
    if sample_end > min(SAMPLE_BYTES, block.size_bytes) or not sample.length_bytes:
        raise BadRequest(
            f"{_name(block)}: its fingerprint is of the bytes {sample.offset_bytes} to {sample_end} of "
            f"{block.size_bytes}, use the first {SAMPLE_BYTES}"
        )
    if inputs_end_bytes > block.size_bytes:
        raise BadRequest(f"{_name(block)}: its inputs end at byte {inputs_end_bytes} of {block.size_bytes}")


def _name(block: CudaIpcBlock) -> str:
    return f"block of device memory for a call on GPU {block.device_uuid}"
