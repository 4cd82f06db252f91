"""Host memory onto a GPU at the speed of the bus.

torch copies pageable memory through one thread. Here several threads fill pinned buffers, from which the GPU fetches:
by copying memory, or by reading a file. Reading spares the page faults of a mapping, and finds a file that was cut
short, where a mapping of it would end the process (SIGBUS). The buffers are all the memory that is used.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

from xditd.ipc.errors import StaleSource

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 16 * 2**20
_MOST_THREADS: Final = 16
_SPARE_BUFFERS: Final = 2
"""Filled while the GPU fetches others, in a tenth of the time. torch keeps pinned memory for the next upload,
288 MiB at most. Smaller pieces are slower: threads then wait for each other's Python."""

_REPORT_EVERY_S: Final = 5.0


class FileStretch(NamedTuple):
    """Bytes of an open file that are to be uploaded; ``path`` is for people."""

    fd: int
    offset_bytes: int
    nbytes: int
    path: str


class _Buffer:
    """Pinned memory, and the moment when the GPU has fetched what was last in it."""

    def __init__(self, size_bytes: int) -> None:
        import torch

        self.bytes = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        self.address = self.bytes.data_ptr()
        self.fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]


def can_upload(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the bytes of ``source``, as they lie on the host, are those that ``target`` on a GPU should hold."""
    return (
        source.device.type == "cpu"
        and target.device.type == "cuda"
        and source.dtype == target.dtype
        and source.shape == target.shape
        and source.is_contiguous()
        and target.is_contiguous()
        and not source.is_neg()
        and not source.is_conj()
    )


def read_into(address: int, size_bytes: int, fd: int, offset_bytes: int, path: str) -> None:
    """Read exactly ``size_bytes`` of a file to ``address``; other threads run meanwhile.

    Raises:
        StaleSource: the file ends before, or cannot be read.
    """
    room = memoryview((ctypes.c_ubyte * size_bytes).from_address(address)).cast("B")
    done = 0
    while done < size_bytes:
        try:
            count = os.preadv(fd, [room[done:]], offset_bytes + done)
        except OSError as error:
            raise StaleSource(f"{path}: reading byte {offset_bytes + done}: {error.strerror}") from error
        if not count:
            raise StaleSource(f"{path}: ends at byte {offset_bytes + done} since it was lent; lend it again")
        done += count


def upload(pairs: Sequence[tuple[torch.Tensor | FileStretch, torch.Tensor]]) -> Iterator[int]:
    """Copy each source into its target; all targets are on one GPU.

    Pairs of tensors pass :func:`can_upload`; the target of a stretch of a file is contiguous and has as many bytes.
    Yields the number of each pair, in order, as soon as work that is then issued on the current stream sees the
    target filled. Later pairs are copied meanwhile. When the iterator ends, or is closed, no copy is under way.

    Raises:
        StaleSource: a file ends before its stretch does, or cannot be read.
    """
    import torch

    if not pairs:
        return
    for source, target in pairs:  # threads read the sources by address: device memory is no source
        if isinstance(source, FileStretch):
            assert target.is_cuda
            assert target.is_contiguous()
            assert target.nbytes == source.nbytes
        else:
            assert can_upload(source, target)
    device = pairs[0][1].device
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    total = sum(source.nbytes for source, _ in pairs)
    size = min(_CHUNK_BYTES, total) or 1
    buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
    for _ in range(min(threads + _SPARE_BUFFERS, -(-total // size))):
        buffers.put(_Buffer(size))
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # what still reads or writes the targets

    def copy(source: torch.Tensor | FileStretch, at: int, target: torch.Tensor) -> None:
        buffer = buffers.get()
        try:
            buffer.fetched.synchronize()
            if isinstance(source, FileStretch):
                read_into(buffer.address, target.numel(), source.fd, source.offset_bytes + at, source.path)
            else:
                ctypes.memmove(buffer.address, source.data_ptr() + at, target.numel())
            # A thread has modes of its own, and a tensor made in inference mode is written in that mode alone.
            with torch.cuda.stream(stream), torch.inference_mode():
                target.copy_(buffer.bytes[: target.numel()], non_blocking=True)
                buffer.fetched.record()
        finally:
            buffers.put(buffer)

    # A fresh thread is on the first GPU, and would open a context there when it goes back from the stream's.
    pool = ThreadPoolExecutor(threads, "xditd-upload", initializer=torch.cuda.set_device, initargs=(device,))
    try:
        jobs = []
        for source, target in pairs:
            flat = target.detach().view(-1).view(torch.uint8)
            starts = range(0, source.nbytes, size)
            jobs.append([pool.submit(copy, source, at, flat[at : at + size]) for at in starts])
        reported, done = time.monotonic(), 0
        for number, chunks in enumerate(jobs):
            for chunk in chunks:
                chunk.result()
                done += size
                if time.monotonic() - reported > _REPORT_EVERY_S:
                    reported = time.monotonic()
                    logger.info("uploading done_gib=%.1f of_gib=%.1f", min(done, total) / 2**30, total / 2**30)
            torch.cuda.current_stream(device).wait_stream(stream)
            yield number
    finally:
        pool.shutdown(cancel_futures=True)
        stream.synchronize()  # buffers and sources may go once nothing reads them
