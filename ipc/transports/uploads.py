"""Upload host memory or files to a GPU through pinned buffers, at nearly the speed of the bus.

torch copies pageable memory with one thread. Here several threads fill pinned buffers, from which the GPU copies: with
bytes of memory, or of a file that is read. Reading avoids the page faults of a mapping, and raises for a truncated
file, where a mapping would end the process (SIGBUS). No other memory is used.
"""

from __future__ import annotations

import _thread
import ctypes
import logging
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from xditd.ipc.errors import Internal, StaleSource
from xditd.ipc.transports.upload_pieces import FileStretch, Piece, Pieces

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_MAX_THREADS: Final = 12
_BUFFERS_PER_THREAD: Final = 2
"""One is filled while the GPU copies the other. They are kept for the next upload: by default, at most 96 MiB
for each GPU."""

_REPORT_EVERY_S: Final = 5.0


class Tuning(NamedTuple):
    """How an upload is divided; ``benchmarks/run.py uploads`` compares values."""

    threads: int = _MAX_THREADS
    """At most; never more than this process has cores."""
    piece_bytes: int = 4 * 2**20
    """Measured on hosts of H200s (docs/performance.md). Where all buffers fit into the host's last-level cache, bytes
    pass its memory bus once instead of three times."""


TUNING: Final = Tuning()


def can_upload(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Return whether the bytes of ``source`` on the host can be copied unchanged to ``target`` on a GPU."""
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


def read_into(room: memoryview, fd: int, offset_bytes: int, path: str) -> None:
    """Fill ``room`` from a file; the GIL is released while reading.

    Raises:
        StaleSource: the file is truncated, or cannot be read.
    """
    while True:
        try:
            nbytes = os.preadv(fd, (room,), offset_bytes)
        except OSError as error:
            raise StaleSource(f"{path}: reading byte {offset_bytes}: {error.strerror}") from error
        if nbytes == len(room):
            return
        offset_bytes += nbytes
        if not nbytes:
            raise StaleSource(f"{path}: truncated to {os.fstat(fd).st_size} bytes since it was lent; lend it again")
        room = room[nbytes:]


@contextmanager
def upload(
    pairs: Sequence[tuple[torch.Tensor | FileStretch, torch.Tensor]], tuning: Tuning = TUNING
) -> Iterator[Iterator[int]]:
    """Copy each source into its target while the ``with`` block runs; all targets are on one GPU.

    Pairs of tensors pass :func:`can_upload`; the target of a file range is contiguous and has as many bytes. The block
    gets an iterator, which yields the number of each pair, in order, once work that is then queued on the current
    stream runs after its copy. Later pairs are copied meanwhile. When the block is left, no copy is running.

    Raises:
        StaleSource: from the iterator: a file is truncated, or cannot be read.
    """
    if not pairs:
        yield iter(())
        return
    for source, target in pairs:  # threads read the sources by address, so device memory cannot be one
        if isinstance(source, FileStretch):
            assert target.is_cuda
            assert target.is_contiguous()
            assert target.nbytes == source.nbytes
        else:
            assert can_upload(source, target)
    threads = _UploadThreads(pairs, tuning)
    try:
        threads.start()
        yield threads.copied()
    finally:
        threads.stop()


class _UploadThreads:
    """The threads of an upload. Each takes the next piece when it is done with one.

    They synchronize by atomic operations of the interpreter (``next`` of a counter), without a lock or a wake-up for
    each piece: where wake-ups are slow, as in virtual machines, threads would wait for the GIL most of the time. For
    the same reason they are no ``threading.Thread``, whose ``start`` waits until the new thread has begun: twelve took
    6 ms, while the first ones already copied.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor | FileStretch, torch.Tensor]], tuning: Tuning) -> None:
        import torch

        self._device = pairs[0][1].device
        self._tuning = tuning
        self._pieces = Pieces(pairs, tuning.piece_bytes)
        self._turns, self._end = count(), len(self._pieces)
        self._taken = 0
        self._copied = [count(1) for _ in pairs]
        self._ready = {number for number, pieces in enumerate(self._pieces.of_pairs) if not pieces}
        self._events: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        """Numbers of pairs that are copied, and ``None`` from each thread once it takes no further piece."""
        self._buffers: list[_Buffer] = []
        """The buffers of all threads: the GPU may still copy from those of a thread that has ended."""
        self._is_over = False
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # what still reads or writes the targets
        self._size = max(1, min(tuning.threads, len(os.sched_getaffinity(0)), self._end))
        self._started = 0
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Start the threads. Call :meth:`stop` afterwards, even if this fails."""
        for _ in range(self._size):
            _thread.start_new_thread(self._run, ())
            self._started += 1

    def copied(self) -> Iterator[int]:
        """Yield the number of each pair once it is copied, in order, as :func:`upload` says."""
        for number in range(len(self._copied)):
            self._wait_for(number)
            yield number

    def _wait_for(self, number: int) -> None:
        """Make work that is queued on the current stream from now on run after this pair's copy."""
        import torch

        while number not in self._ready:
            try:
                event = self._events.get(timeout=_REPORT_EVERY_S)
            except queue.Empty:
                of_gib = self._pieces.nbytes / 2**30
                logger.info("uploading done_gib=%.1f of_gib=%.1f", of_gib * self._taken / self._end, of_gib)
                continue
            if event is None:
                if self._failure is not None:
                    raise self._failure
            else:
                self._ready.add(event)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def stop(self) -> None:
        """Start no further piece, and wait for the running copies."""
        self._is_over = True
        while self._started:
            self._ended.get()
            self._started -= 1
        self._failure = None  # its traceback refers to this object
        self._stream.synchronize()
        _Buffer.keep(self._buffers, self._stream, self._tuning.threads * _BUFFERS_PER_THREAD)
        self._buffers.clear()

    def _run(self) -> None:
        try:
            self._copy_pieces()
        except BaseException as error:  # noqa: BLE001  # it is raised where the upload is waited for
            self._failure = error
        finally:  # no piece is left, or a copy has failed
            self._is_over = True
            self._events.put(None)
            self._ended.put(None)

    def _copy_pieces(self) -> None:
        import torch

        buffers: deque[_Buffer] = deque()
        # A new thread's device is the first GPU, on which it would create a context.
        torch.cuda.set_device(self._device)
        while not self._is_over and (turn := next(self._turns)) < self._end:
            self._taken = turn
            if len(buffers) < _BUFFERS_PER_THREAD:
                buffers.append(_Buffer.take(self._stream, self._tuning.piece_bytes))
                self._buffers.append(buffers[-1])
            buffers.rotate()  # to the least recently used one
            piece = self._pieces.make(turn)
            buffers[0].upload(piece)
            for number, *_ in piece.copies:
                if next(self._copied[number]) == self._pieces.of_pairs[number]:
                    self._events.put(number)


class _Buffer:
    """Pinned memory of a thread, and the CUDA event after the last copy from it."""

    _kept: Final[dict[tuple[torch.device, int], deque[_Buffer]]] = {}
    """By GPU and size: to make them anew takes milliseconds of each upload."""

    @classmethod
    def take(cls, stream: torch.cuda.Stream, size_bytes: int) -> _Buffer:
        """Return a buffer for copies on a stream: one that is kept, or a new one."""
        try:
            buffer = cls._kept[stream.device, size_bytes].pop()
        except (KeyError, IndexError):
            buffer = cls(size_bytes)
        buffer._use_stream(stream)
        return buffer

    @classmethod
    def keep(cls, buffers: Sequence[_Buffer], stream: torch.cuda.Stream, most: int) -> None:
        """Keep buffers for later uploads, once no copy from them is running: the last ``most`` of a size."""
        for buffer in buffers:
            kept = cls._kept.setdefault((stream.device, buffer.size_bytes), deque())
            kept.append(buffer)
            with suppress(IndexError):  # other threads take and keep buffers meanwhile
                if len(kept) > most:
                    kept.popleft()

    def __init__(self, size_bytes: int) -> None:
        import torch

        self.size_bytes = size_bytes
        self._memory = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        self._address = self._memory.data_ptr()
        self._room = memoryview((ctypes.c_ubyte * size_bytes).from_address(self._address)).cast("B")
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._driver = _driver()

    def _use_stream(self, stream: torch.cuda.Stream) -> None:
        self._copied.record(stream)  # creates the event, and makes the GPU's context current in this thread
        self._event = self._copied.cuda_event
        self._stream = stream.cuda_stream

    def upload(self, piece: Piece) -> None:
        """Fill the buffer once it is free, and start the copy to the GPU."""
        file, start, nbytes, copies = piece
        driver = self._driver
        if driver.query(self._event):  # seldom: a thread has two buffers
            _check("cuEventSynchronize", driver.wait(self._event))
        if file is None:
            ctypes.memmove(self._address, start, nbytes)
        else:
            room = self._room if nbytes == self.size_bytes else self._room[:nbytes]
            read_into(room, file.fd, start, file.path)
        for _, offset_bytes, target, copied in copies:
            _check("cuMemcpyHtoDAsync", driver.copy(target, self._address + offset_bytes, copied, self._stream))
        _check("cuEventRecord", driver.record(self._event, self._stream))


class _Driver(NamedTuple):
    """The CUDA driver's functions that each piece calls.

    Those that return at once keep the GIL. torch and cuda-bindings release it in each call, and then a thread waits
    longer to acquire it again than the call takes.

    Source: CUDA Driver API, "cuMemcpyHtoDAsync", "cuEventRecord", "cuEventQuery", "cuEventSynchronize".
    """

    copy: Callable[[int, int, int, int], int]
    record: Callable[[int, int], int]
    query: Callable[[int], int]
    wait: Callable[[int], int]


def _check(what: str, status: int) -> None:
    if status:
        raise Internal(f"{what}: error {status} of the CUDA driver")


@cache
def _driver() -> _Driver:
    with_gil, without_gil = ctypes.PyDLL("libcuda.so.1"), ctypes.CDLL("libcuda.so.1")
    copy, record, query, wait = (
        with_gil.cuMemcpyHtoDAsync_v2,
        with_gil.cuEventRecord,
        with_gil.cuEventQuery,
        without_gil.cuEventSynchronize,
    )
    copy.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    record.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    query.argtypes = wait.argtypes = (ctypes.c_void_p,)
    return _Driver(copy, record, query, wait)
