"""The other ranks: which GPU each one has, and how they agree before anyone enters a collective."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from xditd.gpu_workers.agreement import Circle, agree
from xditd.ipc.errors import OtherRankFailed, OutOfMemory, XditdError

_UUID_BYTES = 64


def gather_uuids(device_uuid: str, world_size: int) -> tuple[str, ...]:
    """Tell every rank the GPU of every other; empty names on the CPU."""
    mine = torch.zeros(_UUID_BYTES, dtype=torch.uint8)
    encoded = device_uuid.encode()
    mine[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    everyone = [torch.zeros_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine)
    return tuple(bytes(row.tolist()).rstrip(b"\0").decode() for row in everyone)


@contextmanager
def together(among: Circle = Circle.GROUP) -> Iterator[None]:
    """Run a block that may fail, on every rank of a circle, and leave it together.

    An error of this rank is raised here once the others know; where another rank failed, this one
    raises ``OtherRankFailed``. So no rank goes on to a collective that another one will not enter.
    """
    fault: XditdError | None = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        fault = OutOfMemory(f"the GPU has no room: {error}".split("\n")[0])
    except XditdError as error:
        fault = error
    if agree(fault is None, among):
        return
    if fault is not None:
        raise fault
    raise OtherRankFailed("another rank refused; its error says why")


@contextmanager
def with_every_core(device: torch.device) -> Iterator[None]:
    """Run a block on rank 0 alone, while the other ranks wait: on the CPU it takes their cores too.

    The result is then that of one process, too: with fewer threads sums are split elsewhere, and FLUX.1's encoder
    gave latents that differed by 1.9e-6.
    """
    if device.type != "cpu":
        yield
        return
    share = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(share)
