"""The other ranks: which GPU each one has, and how they agree before anyone enters a collective."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from xditd.gpu_workers.parallel.agreement import Circle, agree
from xditd.ipc.errors import OtherRankFailed, OutOfMemory, XditdError

_UUID_BYTES = 64
_LENGTH_BYTES = 4


def gather_uuids(device_uuid: str, world_size: int) -> tuple[str, ...]:
    """Tell every rank the GPU of every other; empty names on the CPU."""
    return tuple(name.decode() for name in gather_bytes(device_uuid.encode(), _UUID_BYTES, world_size))


def gather_bytes(mine: bytes, most_bytes: int, world_size: int) -> list[bytes]:
    """Tell every rank what each one has to say, at most ``most_bytes``, which all name alike."""
    assert len(mine) <= most_bytes
    padded = len(mine).to_bytes(_LENGTH_BYTES, "big") + mine.ljust(most_bytes, b"\0")
    everyone = [torch.zeros(len(padded), dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(everyone, torch.tensor(list(padded), dtype=torch.uint8))
    rows = [bytes(row.tolist()) for row in everyone]
    return [row[_LENGTH_BYTES:][: int.from_bytes(row[:_LENGTH_BYTES], "big")] for row in rows]


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
        # It stays behind the other one as its context, and the frames that failed hold views of what is to be unmapped.
        traceback.clear_frames(error.__traceback__)
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

    The result is then that of one process, too: with fewer threads sums are split elsewhere, and the encoder of a
    VAE gave latents that differed by 1.9e-6.
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
