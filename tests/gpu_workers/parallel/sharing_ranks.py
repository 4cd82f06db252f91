"""A program, not a test: gloo ranks exchange their shares of a buffer, and print the faults.

    python sharing_ranks.py FOLDER RANKS

Their buffers are files instead of memory of a GPU: each rank opens the other's by its number. All else is as on GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

SIZE = 70 * 2**20 + 12_345
SMALL = 60 * 2**20
OFFSET = 4096 * 3
"""Where the buffer begins in its allocation."""


def run_rank(rank: int, ranks: int, folder: str) -> None:
    from xditd.gpu_workers.parallel import copy_chain, gpu_copies, rank_sync
    from xditd.gpu_workers.parallel.layouts import ParallelLayout
    from xditd.gpu_workers.parallel.upload_partition import split
    from xditd.ipc.degrees import Degrees
    from xditd.ipc.errors import Internal, OtherRankFailed, StaleSource, XditdError
    from xditd.ipc.tensors import CudaIpcBlock
    from xditd.ipc.transports.cuda_ipc import NotExportable
    from xditd.ipc.transports.fingerprints import take_fingerprint

    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    rank_sync.share_page(store, "flags", rank, ranks)
    torch.set_num_threads(1)

    def allocation_of(owner: int) -> torch.Tensor:
        path = str(Path(folder) / f"memory{owner}")
        return torch.from_file(path, shared=True, size=OFFSET + SIZE, dtype=torch.uint8)

    buffer = allocation_of(rank)[OFFSET:]
    faults: set[str] = set()
    opened: list[Mapping] = []

    class Mapping:
        """Another rank's allocation, opened."""

        def __init__(self, block: CudaIpcBlock, index: int) -> None:
            if "open" in faults and len(opened) == ranks - 2:
                raise StaleSource("this one cannot be opened")
            self._bytes = allocation_of(block.handle[0])
            opened.append(self)

        def copy_to(self, target: torch.Tensor, offset_bytes: int) -> None:
            if "copy" in faults and target.numel() > 4096:
                raise Internal("a copy that fails")
            target.copy_(self._bytes[offset_bytes:][: target.numel()])
            if "sample" in faults:
                target[0] += 1

        def close(self) -> None:
            opened.remove(self)

    def export(base: int, whole: torch.Tensor, index: int, at: int, length: int) -> CudaIpcBlock:
        if "export" in faults:
            raise NotExportable("no handle for this")
        handle = bytes([rank]) * 64
        fingerprint = take_fingerprint(whole, at, length)
        return CudaIpcBlock(device_uuid="GPU", handle=handle, size_bytes=whole.numel(), fingerprint=fingerprint)

    copy_chain.segment_of = lambda tensor: (tensor.data_ptr() - OFFSET, OFFSET + SIZE)
    copy_chain.wrap_segment = lambda base, size, index: allocation_of(rank)
    copy_chain.export_allocation = export
    gpu_copies.CudaMapping = Mapping
    torch.cuda.synchronize = lambda device: None
    torch.cuda.current_stream = lambda device: SimpleNamespace(synchronize=lambda: None)

    torch.cuda.device_count = lambda: 0
    layout = ParallelLayout(rank, Degrees(ulysses=ranks), torch.device("cuda", 0), "none")
    copies = gpu_copies.GpuCopies(layout, ("GPU",) * ranks)
    expected = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wrong: list[str] = []
    is_uploading = False

    def upload(parts: Sequence[range]) -> Generator[None, None, None]:
        nonlocal is_uploading
        is_uploading = True
        try:
            for number, part in enumerate(parts):
                if f"upload {number}" in faults:
                    raise StaleSource("the file ends here")
                buffer[part.start : part.stop] = expected[part.start : part.stop]
                yield
            if "changed" in faults:
                raise StaleSource("the file has changed")
        finally:
            is_uploading = False

    def share(what: str, fault: str = "", faulty: int = 0) -> list[str]:
        """Fill the buffer, and look at it; returns the phases."""
        if fault and rank == faulty:
            faults.add(fault)
        buffer.fill_(7)
        rank_sync.agree(True)
        phases: list[str] = []
        try:
            own = copies.fill(buffer, upload, phases.append)
            if not torch.equal(buffer, expected):
                wrong.append(f"{what}: other bytes")
            if own != split(range(SIZE), ranks)[rank]:
                wrong.append(f"{what}: uploaded {own}")
        finally:
            faults.clear()
            if opened or is_uploading:
                wrong.append(f"{what}: left open")
            rank_sync.agree(True)
        return phases

    def fail(fault: str, kind: type[XditdError]) -> None:
        """Fail on one rank, then on another: it raises its error, the others ``OtherRankFailed``."""
        for faulty in range(ranks):
            try:
                share(fault, fault, faulty)
            except (kind, OtherRankFailed) as error:
                if isinstance(error, kind) != (rank == faulty):
                    wrong.append(f"{fault} on rank {faulty}: {error!r}")
            else:
                wrong.append(f"{fault} on rank {faulty}: no error")

    if share("broadcast") != ["copy", "peer_copy"]:
        wrong.append("broadcast: phases")
    for fault in ("upload 0", "changed"):
        fail(fault, StaleSource)
    whole, buffer = buffer, buffer[:SMALL]
    if copies.fill(buffer, upload, [].append) != range(SMALL) or not torch.equal(buffer, expected[:SMALL]):
        wrong.append("a small buffer is shared")
    buffer = whole
    copies.is_direct = True
    if share("direct") != ["copy", "peer_copy", "peer_close"]:
        wrong.append("direct: phases")
    for fault in ("export", "open", "sample"):
        for faulty in range(ranks):
            if share(f"{fault} fails on rank {faulty}", fault, faulty) != ["copy", "peer_close", "peer_copy"]:
                wrong.append(f"{fault} fails on rank {faulty}: not broadcast")
    fail("copy", Internal)
    for fault in ("upload 0", "upload 1", "upload 3", "changed"):
        fail(fault, StaleSource)
    share("direct, after faults")
    print(f"rank {rank}: {wrong or 'complete'}\n", end="", flush=True)  # one write: ranks share the pipe
    dist.destroy_process_group()


def main(folder: str, ranks: int) -> None:
    import xditd.gpu_workers.parallel.gpu_copies  # noqa: F401 - before the fork, so that it is imported once

    torch.multiprocessing.start_processes(run_rank, (ranks, folder), nprocs=ranks, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
