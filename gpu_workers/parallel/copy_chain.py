"""Pass lent blocks along a chain of GPUs: each rank copies from the rank before it, while the next one copies from it.

The rank after the block's own copies from the lender. Every GPU is read by one other and reads one other, so three
copies take little more time than one. A rank says how far it is by :func:`~rank_sync.post`; the next one follows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import torch

from xditd.gpu_workers.parallel.rank_sync import agree, gather_bytes, post, posted
from xditd.gpu_workers.parallel.upload_partition import split
from xditd.ipc.errors import OtherRankFailed, XditdError
from xditd.ipc.tensors import CudaIpcBlock
from xditd.ipc.transports.cuda_ipc import CudaMapping, export_allocation, segment_of, wrap_segment
from xditd.ipc.transports.fingerprints import check_fingerprint

MAX_BLOCK_BYTES: Final = 1024
"""For the encoded description of device memory, which takes about 300."""
PARTS: Final = 48
"""Of everything that is passed on. Each rank after the first ends one part later than the one before."""
SMALLEST_PART: Final = 64 * 2**20
_FAILED: Final = -1
_PAUSE_S: Final = 20e-6


class _Source(NamedTuple):
    """Where this rank reads a block: it begins at byte ``at`` of ``mapping``."""

    mapping: CudaMapping
    at: int
    is_relayed: bool
    """Whether it is a copy that the rank before gets meanwhile."""

    def begin(self, target: torch.Tensor, part: range) -> None:
        """Begin to copy bytes ``part`` of the block to ``target``, which holds the whole block."""
        self.mapping.copy_to(target.narrow(0, part.start, len(part)), self.at + part.start)


class CopyChain:
    """Copies of ``blocks`` (by number) for the ranks that lack them; all ranks make the same calls.

    ``missing`` are this rank's buffers to fill (1-D uint8, as long as the block).

    Raises:
        torch.OutOfMemoryError: the GPU has no room for a few KiB.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int,
        peer_uuids: Sequence[str],
        blocks: Mapping[int, CudaIpcBlock],
        missing: Mapping[int, torch.Tensor],
    ) -> None:
        self._device, self._rank, self._ranks = device, rank, len(peer_uuids)
        self._before = (rank - 1) % self._ranks
        self._owners = {number: peer_uuids.index(block.device_uuid) for number, block in blocks.items()}
        self._blocks, self._missing = blocks, missing
        longest = max(block.fingerprint.length_bytes for block in blocks.values())
        self._sample = torch.empty(longest, dtype=torch.uint8, device=device)
        self._mappings: dict[bytes, CudaMapping] = {}
        self._sources: dict[int, _Source] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def open(self) -> str:
        """Open what this rank reads; return the reason if it cannot be used, else ``""``.

        Some bytes of each source are compared. The rank on the lender's GPU has opened its handle before: if it fails
        here, the path between the GPUs is at fault (IOMMU, driver), or the lender has just died.
        """
        fault = ""
        relayed: dict[int, CudaIpcBlock] = {}
        if self._ranks > 2:
            mine: dict[int, CudaIpcBlock] = {}
            try:
                mine = self._export()
            except XditdError as error:  # the others wait for the exchange
                fault = error.detail
            longest = MAX_BLOCK_BYTES * (1 + len(self._blocks))
            everyone = gather_bytes(msgspec.msgpack.encode(mine), longest, self._ranks)
            relayed = msgspec.msgpack.decode(everyone[self._before], type=dict[int, CudaIpcBlock])
        try:
            for number in self._missing:
                is_relayed = self._owners[number] != self._before
                if is_relayed and number not in relayed:
                    return fault or f"rank {self._before} has no handle for its copy"
                self._open_source(number, relayed[number] if is_relayed else self._blocks[number], is_relayed)
        except XditdError as error:  # the others wait to agree
            return error.detail
        return fault

    def start(self, parts: Mapping[int, Sequence[range]]) -> None:
        """Begin to copy these bytes of the blocks; they are the same on all ranks, which have all opened the chain."""
        if self._ranks == 2:
            for number, source in self._sources.items():
                for part in parts[number]:
                    source.begin(self._missing[number], part)
            return
        torch.cuda.current_stream(self._device).synchronize()  # the buffers' memory may have been used before
        post(0)
        agree(True)  # no rank reads the number of an earlier chain
        if self._sources:
            thread = threading.Thread(target=self._run, args=(list(self._items(parts)),), name="xditd-chain")
            thread.start()
            self._thread = thread

    def finish(self) -> None:
        """Wait until this rank has all bytes.

        Raises:
            StaleSource: the bytes that came are not those that were lent.
            OtherRankFailed: the rank before has failed.
        """
        self._join()
        torch.cuda.synchronize(self._device)
        if self._error is not None:
            raise self._error
        for number, source in self._sources.items():
            if source.is_relayed:
                check_fingerprint(self._missing[number], self._blocks[number].fingerprint, "a copy that was passed on")

    def close(self) -> None:
        """Close what was opened."""
        self._join()
        self._sources.clear()
        while self._mappings:
            self._mappings.popitem()[1].close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _export(self) -> dict[int, CudaIpcBlock]:
        """Describe the buffers that the next rank reads, with fingerprints of what they hold before the copy."""
        after = (self._rank + 1) % self._ranks
        found: dict[int, CudaIpcBlock] = {}
        for number, buffer in self._missing.items():
            if self._owners[number] != after:
                lent = self._blocks[number].fingerprint
                found[number] = export_buffer(buffer, lent.offset_bytes, lent.length_bytes, self._device)
        return found

    def _open_source(self, number: int, block: CudaIpcBlock, is_relayed: bool) -> None:
        # The current GPU is this rank's own, so that no CUDA context is made on the other. A handle opens only once.
        if (mapping := self._mappings.get(block.handle)) is None:
            mapping = self._mappings[block.handle] = CudaMapping(block, self._device.index)
        expected = block.fingerprint
        sample = self._sample[: expected.length_bytes]
        mapping.copy_to(sample, expected.offset_bytes)
        check_fingerprint(
            sample,
            msgspec.structs.replace(expected, offset_bytes=0),
            f"GPU {block.device_uuid}, seen from another GPU",
        )
        start = expected.offset_bytes - self._blocks[number].fingerprint.offset_bytes if is_relayed else 0
        self._sources[number] = _Source(mapping, start, is_relayed)

    def _items(self, parts: Mapping[int, Sequence[range]]) -> Iterator[tuple[int, range]]:
        """List what is copied, in the order of all ranks: number of block, and bytes."""
        total = sum(len(part) for number in self._blocks for part in parts[number])
        longest = max(SMALLEST_PART, -(-total // PARTS))
        for number in self._blocks:
            for part in parts[number]:
                yield from ((number, piece) for piece in split(part, max(1, round(len(part) / longest))) if piece)

    def _run(self, items: Sequence[tuple[int, range]]) -> None:
        try:
            self._pass_on(items)
        except BaseException as error:  # noqa: BLE001 - finish() raises it
            self._error = error
            post(_FAILED)

    def _pass_on(self, items: Sequence[tuple[int, range]]) -> None:
        """Copy each item as soon as the rank before has it, and post how many this rank has."""
        begun: deque[tuple[int, torch.cuda.Event]] = deque()
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            for at, (number, part) in enumerate(items):
                source = self._sources.get(number)
                if source is None:
                    continue
                while source.is_relayed and not self._has(at):
                    _post_finished(begun)
                    time.sleep(_PAUSE_S)
                source.begin(self._missing[number], part)
                done = torch.cuda.Event()
                done.record()
                begun.append((at + 1, done))
                _post_finished(begun)
            while begun:
                time.sleep(_PAUSE_S)
                _post_finished(begun)
            post(len(items))

    def _has(self, at: int) -> bool:
        """Say whether the rank before has item ``at``."""
        count = posted(self._before)
        if count == _FAILED:
            raise OtherRankFailed("the rank before, whose copy is passed on, has failed; its error says why")
        return count > at


def export_buffer(buffer: torch.Tensor, at: int, length_bytes: int, device: torch.device) -> CudaIpcBlock:
    """Describe the allocation in which torch's allocator has put a buffer (1-D uint8).

    Its fingerprint is of the present bytes from ``at`` of the buffer on, and has their place in the allocation.

    Raises:
        NotExportable: CUDA gives no handle for that memory.
    """
    base, size = segment_of(buffer)
    whole = wrap_segment(base, size, device.index)
    return export_allocation(base, whole, device.index, buffer.data_ptr() - base + at, length_bytes)


def _post_finished(begun: deque[tuple[int, torch.cuda.Event]]) -> None:
    """Post the number of the last copy that has ended."""
    last = 0
    while begun and begun[0][1].query():
        last = begun.popleft()[0]
    if last:
        post(last)
