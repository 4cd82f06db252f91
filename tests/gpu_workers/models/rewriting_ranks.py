"""A program, not a test: two gloo ranks load a component again after some of its tensors were written.

    python rewriting_ranks.py FOLDER

Rank 0 maps the client's block, and rank 1 has a copy of it. The block is a file instead of memory of a GPU: rank 1
opens it, as by peer access, or gets it by broadcast. Tensors that no rank can view are copied by both.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

SIZES = {"a": 4096, "b": 8192, "c": 256, "d": 70_000}
ODD = {"e": 512, "f": 1024}
"""In a block of host memory that both ranks map, at offsets that are not aligned: they are copied."""


def run_rank(rank: int, folder: str) -> None:
    from xditd.gpu_workers.models.clock import Clock
    from xditd.gpu_workers.models.component_loading import TensorLoader
    from xditd.gpu_workers.parallel import copy_chain, gpu_copies, rank_sync
    from xditd.gpu_workers.parallel.layouts import ParallelLayout
    from xditd.gpu_workers.weights.blocks import OpenBlock
    from xditd.ipc.degrees import Degrees
    from xditd.ipc.tensors import CudaIpcBlock, Fingerprint, HostShmBlock, Manifest, TensorSpec
    from xditd.ipc.transports.fingerprints import take_fingerprint

    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    rank_sync.share_page(store, "flags", rank, 2)
    torch.set_num_threads(1)

    def memory(name: str, size: int) -> torch.Tensor:
        return torch.from_file(f"{folder}/{name}", shared=True, size=size, dtype=torch.uint8)

    device_bytes, host_bytes = memory("device", sum(SIZES.values())), memory("host", 8 + sum(ODD.values()))
    sent: list[int] = []
    broadcast = dist.broadcast

    def counted(tensor: torch.Tensor, src: int) -> None:
        sent.append(tensor.numel())
        broadcast(tensor, src=src)

    class Mapping:
        """The client's allocation, opened by peer access."""

        def __init__(self, *_: object) -> None:
            pass

        def copy_to(self, target: torch.Tensor, offset_bytes: int) -> None:
            sent.append(target.numel())
            target.copy_(device_bytes[offset_bytes:][: target.numel()])

        def close(self) -> None:
            pass

    dist.broadcast = counted
    copy_chain.CudaMapping = Mapping
    torch.cuda.synchronize = lambda device: None
    copies = gpu_copies.GpuCopies(
        ParallelLayout(rank, Degrees(ulysses=2), torch.device("cpu"), "none"), ("GPU", "other")
    )
    loader = TensorLoader(torch.device("cpu"), copies, None)
    specs, at = [], 0
    for name, size in SIZES.items():
        specs.append(TensorSpec(name, "uint8", (size,), 0, at))
        at += size
    at = 8
    for name, size in ODD.items():
        specs.append(TensorSpec(name, "uint8", (size,), 1, at))
        at += size
    match = SimpleNamespace(read_names={spec.name for spec in specs}, packed={}, needs_conversion=False, bind=dict)
    wrong: list[str] = []

    def load(kept: object = None, written: tuple[str, ...] = ()) -> object:
        """Load as ``Components`` does, and compare what this rank has with what the client holds."""
        sent.clear()
        blocks = (
            CudaIpcBlock(
                device_uuid="GPU",
                handle=bytes(64),
                size_bytes=device_bytes.numel(),
                fingerprint=take_fingerprint(device_bytes, 0),
            ),
            HostShmBlock(
                fd=0, inode=1, size_bytes=host_bytes.numel(), fingerprint=Fingerprint(length_bytes=0, digest=bytes(16))
            ),
        )
        manifest = Manifest(label="x", blocks=blocks, tensors=tuple(specs))
        opened = [
            None if rank else OpenBlock(("client", 0), None, device_bytes),
            OpenBlock(("client", 1), None, host_bytes),
        ]
        loaded = loader.load(manifest, match, opened, Clock(), kept, written)
        for spec in specs:
            source = (device_bytes, host_bytes)[spec.block]
            if not torch.equal(loaded.tensors[spec.name], source[spec.offset_bytes :][: spec.extent_bytes]):
                wrong.append(f"{spec.name}: other bytes")
        rank_sync.agree(True)
        return loaded

    def write(*names: str) -> None:
        rank_sync.agree(True)
        if not rank:
            for spec in specs:
                if spec.name in names:
                    (device_bytes, host_bytes)[spec.block][spec.offset_bytes :][: spec.extent_bytes] += 1
        rank_sync.agree(True)

    def expect(what: str, loaded: object, peer: list[int], host: int) -> None:
        if (not copies.is_direct or rank) and sent != peer:
            wrong.append(f"{what}: {sent} bytes from the other GPU, not {peer}")
        if loaded.copied.host_to_host != host:
            wrong.append(f"{what}: {loaded.copied.host_to_host} bytes on the host, not {host}")

    sample = min(4096, device_bytes.numel())
    for is_direct in (False, True):
        copies.is_direct = is_direct
        probe = [sample] if is_direct else []
        first = load()
        expect("whole", first, [*probe, device_bytes.numel()], sum(ODD.values()))
        write("b", "c", "f")
        again = load(first.copies, ("b", "c", "f"))
        expect("some", again, [*probe, SIZES["b"] + SIZES["c"]], ODD["f"])
        write("a", "d")
        last = load(again.copies, ("a", "d"))
        expect("others", last, [*probe, SIZES["a"], SIZES["d"]], 0)
        if any(
            one.data_ptr() != other.data_ptr()
            for one, other in zip(first.copies.buffers, last.copies.buffers, strict=True)
        ):
            wrong.append("other memory")
        expect("none", load(last.copies), probe, 0)
        # What is not named keeps the older bytes: the caller's word is taken.
        write("e")
        load(last.copies)
        if wrong[-1:] != ["e: other bytes"]:
            wrong.append("a tensor that is not named was copied")
        else:
            wrong.pop()
    print(f"rank {rank}: {wrong or 'complete'}\n", end="", flush=True)  # one write: ranks share the pipe
    dist.destroy_process_group()


def main(folder: str) -> None:
    import xditd.gpu_workers.models.component_loading  # noqa: F401 - before the fork, so that it is imported once

    for name, size in (("device", sum(SIZES.values())), ("host", 8 + sum(ODD.values()))):
        with open(f"{folder}/{name}", "wb") as file:
            file.write(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes())
    torch.multiprocessing.start_processes(run_rank, (folder,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
