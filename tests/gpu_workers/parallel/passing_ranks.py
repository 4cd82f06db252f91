"""A program, not a test: ranks pass lent blocks along, and print the faults.

    python passing_ranks.py FOLDER RANKS [cuda]

On GPUs (several ranks may share one) the blocks are arenas of the parent process. Without them memory is in files, and
each copy ends some time after it has begun, as on a GPU. All else is the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

SIZES = (40 * 2**20 + 12_345, 5 * 2**20 + 1)
"""Of the blocks; the second one's owner is another rank."""
SAMPLE_AT = (4096 * 3, 100)
OFFSET = 512 * 7
"""Where a rank's buffer begins in its allocation, in files."""


def name_of(rank: int) -> str:
    return f"GPU-{rank}"


def owner_of(number: int, ranks: int) -> int:
    return (0, ranks - 1)[number]


def expected_bytes(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (SIZES[number],), dtype=torch.uint8, generator=generator)


class _Files:
    """What stands for CUDA where there is none."""

    def __init__(self, folder: str, rank: int, faults: set[str]) -> None:
        self._folder, self._rank, self._faults = Path(folder), rank, faults
        self._begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._addresses: dict[int, str] = {}
        self.opened: list[object] = []
        self.copies = 0

    def marker(self, rank: int) -> Path:
        """A file that exists while a rank has something open."""
        return self._folder / f"open-by-{rank}"

    def lent(self, number: int) -> torch.Tensor:
        return self._memory(f"lent{number}", SIZES[number])

    def buffer(self, number: int) -> torch.Tensor:
        name = f"rank{self._rank}-{number}"
        whole = self._memory(name, OFFSET + SIZES[number])
        self._addresses[whole.data_ptr()] = name
        return whole[OFFSET:]

    def _memory(self, name: str, size: int) -> torch.Tensor:
        return torch.from_file(str(self._folder / name), shared=True, size=size, dtype=torch.uint8)

    def install(self) -> None:
        from xditd.gpu_workers.parallel import copy_chain
        from xditd.ipc.errors import Internal, StaleSource
        from xditd.ipc.tensors import CudaIpcBlock
        from xditd.ipc.transports.cuda_ipc import NotExportable
        from xditd.ipc.transports.fingerprints import take_fingerprint

        files = self

        class Mapping:
            def __init__(self, block: CudaIpcBlock, index: int) -> None:
                if "open" in files._faults:
                    raise StaleSource("this one cannot be opened")
                self._bytes = files._memory(block.handle.rstrip(b"\0").decode(), block.size_bytes)
                files.opened.append(self)
                files.marker(files._rank).touch()

            def copy_to(self, target: torch.Tensor, offset_bytes: int) -> None:
                source = self._bytes[offset_bytes:][: target.numel()]
                if target.numel() <= 4096:  # a sample, read at once
                    if "read" in files._faults:
                        raise Internal("a sample that cannot be read")
                    target.copy_(source)
                    if "sample" in files._faults:
                        target[0] += 1
                    return
                files.copies += 1
                if "copy" in files._faults and files.copies == (1 if len(files.opened) == 1 else 3):
                    raise Internal("a copy that fails")
                files._begun.append((target, source))
                if "other" in files._faults:
                    files._begun.append((target[:4096], source[1:4097]))

            def close(self) -> None:
                end_s = time.monotonic() + 0.5
                while "close" in files._faults and not (files._folder / "left").exists() and time.monotonic() < end_s:
                    time.sleep(0.01)
                files.opened.remove(self)
                if not files.opened:
                    files.marker(files._rank).unlink()

        class Event:
            """Copies that have begun end at the third question."""

            def record(self) -> None:
                self._copies, self._asked = list(files._begun), 0
                files._begun.clear()

            def query(self) -> bool:
                self._asked += 1
                if self._asked < 3:
                    return False
                for target, source in self._copies:
                    target.copy_(source)
                self._copies.clear()
                return True

        def synchronize(_device: object = None) -> None:
            for target, source in files._begun:
                target.copy_(source)
            files._begun.clear()

        def export(base: int, whole: torch.Tensor, index: int, at: int, length: int) -> CudaIpcBlock:
            if "export" in files._faults:
                raise NotExportable("no handle for this")
            handle = files._addresses[base].encode().ljust(64, b"\0")
            print_of = take_fingerprint(whole, at, length)
            return CudaIpcBlock(
                device_uuid=name_of(files._rank), handle=handle, size_bytes=whole.numel(), fingerprint=print_of
            )

        copy_chain.CudaMapping = Mapping
        copy_chain.segment_of = lambda tensor: (tensor.data_ptr() - OFFSET, OFFSET + tensor.numel())
        copy_chain.wrap_segment = lambda base, size, index: self._memory(self._addresses[base], size)
        copy_chain.export_allocation = export
        torch.cuda.Event = Event
        torch.cuda.Stream = lambda device: nullcontext()
        torch.cuda.stream = torch.cuda.device = lambda _: nullcontext()
        torch.cuda.synchronize = synchronize
        stream = torch.nn.Module()
        stream.synchronize = synchronize
        torch.cuda.current_stream = lambda _device: stream
        torch.cuda.device_count = lambda: 0


def run_rank(rank: int, ranks: int, folder: str, blocks: bytes, on_gpus: bool) -> None:
    from xditd.gpu_workers.parallel import copy_chain, gpu_copies, rank_sync
    from xditd.gpu_workers.parallel.layouts import ParallelLayout
    from xditd.ipc.degrees import Degrees
    from xditd.ipc.errors import Internal, OtherRankFailed, StaleSource, XditdError
    from xditd.ipc.tensors import CudaIpcBlock
    from xditd.ipc.transports.cuda_ipc import CudaMapping

    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    rank_sync.share_page(store, "flags", rank, ranks)
    torch.set_num_threads(1)
    copy_chain.SMALLEST_PART = 2**20
    faults: set[str] = set()
    files = _Files(folder, rank, faults)
    device = torch.device("cpu")
    if on_gpus:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        files.install()
    copies = gpu_copies.GpuCopies(
        ParallelLayout(rank, Degrees(ulysses=ranks), device, "none"), tuple(name_of(each) for each in range(ranks))
    )
    lent = msgspec.msgpack.decode(blocks, type=list[CudaIpcBlock])
    sources, missing, mappings = [], {}, []
    for number, block in enumerate(lent):
        if owner_of(number, ranks) != rank:
            missing[number] = (
                torch.empty(SIZES[number], dtype=torch.uint8, device=device) if on_gpus else files.buffer(number)
            )
            sources.append(missing[number])
        elif on_gpus:
            mappings.append(CudaMapping(block, device.index))
            sources.append(mappings[-1].bytes_tensor()[: SIZES[number]])
        else:
            sources.append(files.lent(number))
    expected = [expected_bytes(number) for number in range(len(SIZES))]
    wrong: list[str] = []

    def share(
        what: str, fault: str = "", faulty: int = 0, parts: dict[int, Sequence[range]] | None = None
    ) -> list[str]:
        """Copy the blocks, and look at them; returns the phases."""
        if fault and rank == faulty:
            faults.add(fault)
        files.copies = 0
        for buffer in missing.values():
            buffer.fill_(7)
        if on_gpus:
            torch.cuda.synchronize(device)
        rank_sync.agree(True)
        phases: list[str] = []
        try:
            with copies.copy_blocks(lent, sources, missing, phases.append, parts):
                pass
            for number, buffer in missing.items():
                wanted = expected[number]
                if parts is not None:
                    wanted = torch.full_like(wanted, 7)
                    for part in parts[number]:
                        wanted[part.start : part.stop] = expected[number][part.start : part.stop]
                if not torch.equal(buffer.cpu(), wanted):
                    wrong.append(f"{what}: other bytes in block {number}")
        finally:
            faults.clear()
            still_open = [each for each in range(ranks) if files.marker(each).exists()]
            (Path(folder) / "left").touch()
            if files.opened or still_open:
                wrong.append(f"{what}: left open by ranks {still_open}")
            rank_sync.agree(True)
            (Path(folder) / "left").unlink(missing_ok=True)
            rank_sync.agree(True)
        return phases

    def fail(fault: str, kind: type[XditdError], faulty: int) -> None:
        """Fail on one rank: it raises its error, the others ``OtherRankFailed``."""
        try:
            share(fault, fault, faulty)
        except (kind, OtherRankFailed) as error:
            if isinstance(error, kind) != (rank == faulty):
                wrong.append(f"{fault} on rank {faulty}: {error!r}")
        else:
            wrong.append(f"{fault} on rank {faulty}: no error")

    if not on_gpus and share("broadcast") != ["peer_copy"]:
        wrong.append("broadcast: phases")
    copies.is_direct = True
    written = {0: [range(4096 * 3, 2**21), range(3 * 2**20, 30 * 2**20)], 1: [range(64, 10_000)]}
    for attempt in ("direct", "again"):
        if share(attempt) != ["peer_open", "peer_copy", "peer_close"]:
            wrong.append(f"{attempt}: phases")
        share(f"{attempt}, parts", parts=written)
    if not on_gpus:
        for faulty in range(ranks):
            for fault in ("export", "open", "read", "sample"):
                is_used = fault != "export" or faulty < ranks - 1 > 1  # the last one's copies are not passed on
                if share(f"{fault} fails on rank {faulty}", fault, faulty)[-1] != (
                    "peer_copy" if is_used else "peer_close"
                ):
                    wrong.append(f"{fault} fails on rank {faulty}: not broadcast")
            fail("copy", Internal, faulty)
        if ranks > 2:  # rank 1 gets wrong bytes of the second block, and passes them on to rank 2
            try:
                share("other", "other", 1)
            except (StaleSource, OtherRankFailed) as error:
                if isinstance(error, StaleSource) != (rank in (1, 2)):
                    wrong.append(f"other bytes come: {error!r}")
            else:
                wrong.append("other bytes come: no error")
        share("the last rank closes late", "close", ranks - 1)
        share("direct, after faults")
    for mapping in mappings:
        sources.clear()
        mapping.close()
    print(f"rank {rank}: {wrong or 'complete'}\n", end="", flush=True)  # one write: ranks share the pipe
    dist.destroy_process_group()


def main(folder: str, ranks: int, on_gpus: bool) -> None:
    import xditd.gpu_workers.parallel.gpu_copies  # noqa: F401 - before the fork, so that it is imported once
    from xditd.ipc.tensors import CudaIpcBlock
    from xditd.ipc.transports.cuda_ipc import DeviceArena
    from xditd.ipc.transports.fingerprints import take_fingerprint

    files = _Files(folder, -1, set())
    blocks, arenas = [], []
    for number, size in enumerate(SIZES):
        name = name_of(owner_of(number, ranks))
        if on_gpus:
            arenas.append(DeviceArena(size, owner_of(number, ranks) % torch.cuda.device_count()))
            arenas[-1].bytes[:size] = expected_bytes(number).to(arenas[-1].bytes.device)
            torch.cuda.synchronize()
            block = msgspec.structs.replace(arenas[-1].block(SAMPLE_AT[number]), device_uuid=name, size_bytes=size)
        else:
            memory = files.lent(number)
            memory.copy_(expected_bytes(number))
            handle = f"lent{number}".encode().ljust(64, b"\0")
            sample = take_fingerprint(memory, SAMPLE_AT[number])
            block = CudaIpcBlock(device_uuid=name, handle=handle, size_bytes=size, fingerprint=sample)
        blocks.append(block)
    torch.multiprocessing.start_processes(
        run_rank,
        (ranks, folder, msgspec.msgpack.encode(blocks), on_gpus),
        nprocs=ranks,
        start_method="spawn" if on_gpus else "fork",
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["cuda"])
