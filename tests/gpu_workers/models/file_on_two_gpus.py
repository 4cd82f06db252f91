"""A program, not a test: lend files to two NCCL ranks, each of which uploads a share, and write what they hold.

    python file_on_two_gpus.py OUT_FOLDER FIRST_DEVICE SECOND_DEVICE

By the way that ranks choose, then by broadcasts: a file, a file that is cut short once both ranks have opened it, one
that is overwritten then and its mtime set back, the first one when the second GPU has no room, and once more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

SHAPE = {"heads": 8, "double_blocks": 1, "single_blocks": 1}
"""123 MiB in bfloat16: enough to be shared."""
MIB = 2**20
WAYS = ("chosen", "broadcast")


def cut(path: Path) -> None:
    """Leave three quarters: the first rank's share is still there."""
    os.truncate(path, path.stat().st_size * 3 // 4)


def overwrite(path: Path) -> None:
    """Write other bytes into the second rank's share, and set the mtime back."""
    old = path.stat()
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\1" * 64)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def run_rank(rank: int, devices: list[str], folder: str, prepares: dict[str, bytes]) -> None:
    from two_gpus import digest_of

    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.codec import command_decoder
    from xditd.ipc.errors import XditdError
    from xditd.ipc.transports.cuda_ipc import device_uuid

    device = torch.device(devices[rank])
    layout = xfuser_start.start(rank, len(devices), f"{folder}/store", device)
    from xditd.gpu_workers.models.components import Components
    from xditd.gpu_workers.parallel.rank_sync import agree, gather_uuids

    name = device_uuid(device.index)
    components = Components(layout, name, gather_uuids(name, layout.world_size))
    is_direct = components.gpu_copies.is_direct
    facts: dict[str, object] = {"is direct": is_direct}

    def free_bytes() -> int:
        """Free memory of this rank's own GPU, once every rank has come as far."""
        torch.cuda.synchronize(device)
        agree(True)
        free = torch.cuda.mem_get_info(device)[0]
        agree(True)
        return free

    def lend(what: str, file: str) -> None:
        """Prepare a file's component, look at it, and forget it; or note the error. Nothing may be left either way."""
        command = command_decoder.decode(prepares[file])
        before = free_bytes()
        try:
            component = components.prepare(command.component_id, command.manifest, command.exporter)
        except XditdError as error:
            facts[f"{what}: error"] = error.code
        else:
            facts[f"{what}: taken"] = before - free_bytes()
            facts[f"{what}: digest"] = digest_of(component.tensors)
            facts[f"{what}: phases"] = sorted(component.timings_ms)
            facts[f"{what}: uploaded"] = component.copied.host_to_device
            facts[f"{what}: peer"] = component.copied.peer
            facts[f"{what}: bytes"] = command.manifest.tensor_bytes
            del component
            components.unmap(command.component_id)
        facts[f"{what}: left"] = before - free_bytes()
        facts[f"{what}: blocks"] = len(components.blocks)

    def lend_and_change(what: str, file: str, change: Callable[[Path], None]) -> None:
        """Change the file between opening and reading it."""
        path = Path(folder, f"{file}.safetensors")
        acquire = components.blocks.acquire

        def acquire_and_change(*given):
            opened = acquire(*given)
            agree(True)
            if rank == 0:
                change(path)
            agree(True)
            return opened

        components.blocks.acquire = acquire_and_change
        lend(what, file)
        components.blocks.acquire = acquire

    def lend_without_room(what: str, file: str) -> None:
        """Leave the second GPU less than a component takes."""
        hog = None
        if rank == 1:
            torch.cuda.empty_cache()
            hog = torch.empty(torch.cuda.mem_get_info(device)[0] - 64 * MIB, dtype=torch.uint8, device=device)
        lend(what, file)
        del hog
        torch.cuda.empty_cache()

    for way in WAYS:
        components.gpu_copies.is_direct = is_direct and way == "chosen"
        lend(f"{way}, whole", "whole")
        lend_and_change(f"{way}, cut short", f"cut, {way}", cut)
        lend_and_change(f"{way}, overwritten", f"overwritten, {way}", overwrite)
        lend_without_room(f"{way}, no room", "whole")
        lend(f"{way}, again", "whole")
    components.close()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def main(folder: str, devices: list[str]) -> None:
    from safetensors.torch import save_file
    from torch import multiprocessing
    from two_gpus import digest_of

    from xditd.client.demo import checkpoints
    from xditd.client.lending import describe
    from xditd.ipc.codec import encode
    from xditd.ipc.processes import identify
    from xditd.ipc.worker_messages import Prepare

    state = checkpoints.flux1_state_dict(1, dtype=torch.bfloat16, **SHAPE)
    Path(folder, "lent.txt").write_text(digest_of(state))
    offers, prepares = [], {}
    for name in ("whole", *(f"{change}, {way}" for change in ("cut", "overwritten") for way in WAYS)):
        path = Path(folder, f"{name}.safetensors")
        save_file(state, path)
        offers.append(describe(path))  # it holds the file open, for the ranks to open it in turn
        command = Prepare(op_number=1, component_id=name, manifest=offers[-1].manifest, exporter=identify(os.getpid()))
        prepares[name] = encode(command)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, devices, folder, prepares)) for rank in range(len(devices))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit(f"ranks ended with {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
