"""Host memory onto a GPU at the speed of the bus.

torch copies pageable memory through one thread. Here several threads copy into pinned buffers, from which the GPU
fetches; page faults of a mapped file are shared among them too.
"""

from __future__ import annotations

import ctypes
import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES: Final = 16 * 2**20
_MOST_THREADS: Final = 8
_BUFFERS_A_THREAD: Final = 2
"""One is filled while the GPU fetches the other. torch keeps pinned memory for the next upload: 256 MiB at most."""


class _Buffer:
    """Pinned memory, and the moment when the GPU has fetched what was last in it."""

    def __init__(self, size_bytes: int) -> None:
        import torch

        self.bytes = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
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


def upload(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[int]:
    """Copy each source into its target; all targets are on one GPU, and every pair passes :func:`can_upload`.

    Yields the number of each pair, in order, as soon as work that is then issued on the current stream sees the
    target filled. Later pairs are copied meanwhile. When the iterator ends, or is closed, no copy is under way.
    """
    import torch

    if not pairs:
        return
    assert all(can_upload(*pair) for pair in pairs)  # threads read the sources by address: device memory is no source
    device = pairs[0][1].device
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    total = sum(source.nbytes for source, _ in pairs)
    size = min(_CHUNK_BYTES, total) or 1
    buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
    for _ in range(min(threads * _BUFFERS_A_THREAD, -(-total // size))):
        buffers.put(_Buffer(size))
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # what still reads or writes the targets

    def copy(address: int, target: torch.Tensor) -> None:
        buffer = buffers.get()
        try:
            buffer.fetched.synchronize()
            ctypes.memmove(buffer.bytes.data_ptr(), address, target.numel())
            # A thread has modes of its own, and a tensor made in inference mode is written in that mode alone.
            with torch.cuda.stream(stream), torch.inference_mode():
                target.copy_(buffer.bytes[: target.numel()], non_blocking=True)
                buffer.fetched.record()
        finally:
            buffers.put(buffer)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="xditd-upload")
    try:
        jobs = []
        for source, target in pairs:
            flat = target.detach().view(-1).view(torch.uint8)
            starts = range(0, source.nbytes, size)
            jobs.append([pool.submit(copy, source.data_ptr() + at, flat[at : at + size]) for at in starts])
        for number, chunks in enumerate(jobs):
            for chunk in chunks:
                chunk.result()
            torch.cuda.current_stream(device).wait_stream(stream)
            yield number
    finally:
        pool.shutdown(cancel_futures=True)
        stream.synchronize()  # buffers and sources may go once nothing reads them
