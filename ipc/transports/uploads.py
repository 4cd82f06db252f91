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
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from xditd.ipc.errors import Internal, StaleSource

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_PIECE_BYTES: Final = 2 * 2**20
"""What a core's cache holds, so that bytes cross the host's memory once, and not three times."""
_MOST_THREADS: Final = 10
_BUFFERS_A_THREAD: Final = 2
"""One is filled while the GPU fetches the other. torch keeps their memory for the next upload, 40 MiB at most."""

_REPORT_EVERY_S: Final = 5.0


class FileStretch(NamedTuple):
    """Bytes of an open file that are to be uploaded; ``path`` is for people."""

    fd: int
    offset_bytes: int
    nbytes: int
    path: str


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


def read_into(room: memoryview, fd: int, offset_bytes: int, path: str) -> None:
    """Fill ``room`` from a file; other threads run meanwhile.

    Raises:
        StaleSource: the file ends before, or cannot be read.
    """
    while True:
        try:
            count = os.preadv(fd, (room,), offset_bytes)
        except OSError as error:
            raise StaleSource(f"{path}: reading byte {offset_bytes}: {error.strerror}") from error
        if count == len(room):
            return
        offset_bytes += count
        if not count:
            raise StaleSource(f"{path}: ends at byte {offset_bytes} since it was lent; lend it again")
        room = room[count:]


def upload(pairs: Sequence[tuple[torch.Tensor | FileStretch, torch.Tensor]]) -> Generator[int, None, None]:
    """Copy each source into its target; all targets are on one GPU.

    Pairs of tensors pass :func:`can_upload`; the target of a stretch of a file is contiguous and has as many bytes.
    Yields the number of each pair, in order, as soon as work that is then issued on the current stream sees the
    target filled. Later pairs are copied meanwhile. When the iterator ends, or is closed, no copy is under way.

    Raises:
        StaleSource: a file ends before its stretch does, or cannot be read.
    """
    if not pairs:
        return
    for source, target in pairs:  # threads read the sources by address: device memory is no source
        if isinstance(source, FileStretch):
            assert target.is_cuda
            assert target.is_contiguous()
            assert target.nbytes == source.nbytes
        else:
            assert can_upload(source, target)
    crew = _Crew(pairs)
    try:
        crew.start()
        for number in range(len(pairs)):
            crew.wait_for(number)
            yield number
    finally:
        crew.stop()


class _Piece(NamedTuple):
    """What is copied through a buffer at once: bytes of pair ``number``."""

    number: int
    source: FileStretch | int
    """Of a file, or an address of the host."""
    at: int
    """Where in the file's stretch."""
    target: int
    """An address of the GPU."""
    nbytes: int


class _Crew:
    """The threads of an upload. Each takes the next piece, whoever is done with one.

    They meet in single steps of the interpreter (``next`` of a counter): no lock is held, and nobody is woken, for a
    piece. Where waking is slow, as in virtual machines, threads would wait for Python most of the time.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor | FileStretch, torch.Tensor]]) -> None:
        import torch

        self._device = pairs[0][1].device
        self._pieces = list(_cut(pairs))
        self._counts = Counter(piece.number for piece in self._pieces)
        self._turns = count()
        self._taken = 0
        self._copied = [count(1) for _ in pairs]
        self._ready = {number for number in range(len(pairs)) if not self._counts[number]}
        self._told: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        """Numbers of pairs that are filled, and ``None`` from each thread at its end."""
        self._buffers: list[_Buffer] = []
        """Of all threads: the GPU may still fetch from those of one that has ended."""
        self._is_over = False
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # what still reads or writes the targets
        self._size = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(self._pieces)))
        self._pool = ThreadPoolExecutor(self._size, "xditd-upload")
        self._running: list[Future[None]] = []

    def start(self) -> None:
        """Begin. Once this was called, and if it failed too, :meth:`stop` must be."""
        self._running += [self._pool.submit(self._run) for _ in range(self._size)]

    def wait_for(self, number: int) -> None:
        """Wait until work that is then issued on the current stream sees this pair's target filled."""
        import torch

        while number not in self._ready:
            try:
                told = self._told.get(timeout=_REPORT_EVERY_S)
            except queue.Empty:
                done, of = (sum(piece.nbytes for piece in self._pieces[:end]) for end in (self._taken, None))
                logger.info("uploading done_gib=%.1f of_gib=%.1f", done / 2**30, of / 2**30)
                continue
            if told is None:
                self._raise_fault()
            else:
                self._ready.add(told)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def stop(self) -> None:
        """Take no further piece, and wait for those that are under way."""
        self._is_over = True
        self._pool.shutdown()
        self._stream.synchronize()
        self._buffers.clear()

    def _raise_fault(self) -> None:
        """Raise what ended a thread, now that one has come to its end; all others are at their last piece."""
        for thread in self._running:
            thread.result()

    def _run(self) -> None:
        import torch

        buffers: deque[_Buffer] = deque()
        try:
            # A fresh thread is on the first GPU, and would open a context there.
            torch.cuda.set_device(self._device)
            while not self._is_over and (turn := next(self._turns)) < len(self._pieces):
                self._taken = turn
                if len(buffers) < _BUFFERS_A_THREAD:
                    buffers.append(_Buffer(self._stream))
                    self._buffers.append(buffers[-1])
                buffers.rotate()  # the one that the GPU has had longest
                buffers[0].carry(self._pieces[turn])
                number = self._pieces[turn].number
                if next(self._copied[number]) == self._counts[number]:
                    self._told.put(number)
        finally:  # nothing is left to take, or all has failed
            self._is_over = True
            self._told.put(None)


class _Buffer:
    """Pinned memory of a thread, and the moment when the GPU has fetched what was last in it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        import torch

        self._memory = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._address = self._memory.data_ptr()
        self._room = memoryview((ctypes.c_ubyte * _PIECE_BYTES).from_address(self._address)).cast("B")
        self._stream = stream.cuda_stream
        self._fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._fetched.record(stream)  # makes it, and the GPU's context the current one of this thread
        self._event = self._fetched.cuda_event
        self._driver = _driver()

    def carry(self, piece: _Piece) -> None:
        """Fill the buffer once it is free, and let the GPU fetch from it."""
        _, source, at, target, nbytes = piece
        driver = self._driver
        if driver.query(self._event):  # seldom: there are two of them
            _check("cuEventSynchronize", driver.wait(self._event))
        if isinstance(source, FileStretch):
            room = self._room if nbytes == _PIECE_BYTES else self._room[:nbytes]
            read_into(room, source.fd, source.offset_bytes + at, source.path)
        else:
            ctypes.memmove(self._address, source + at, nbytes)
        _check("cuMemcpyHtoDAsync", driver.copy(target, self._address, nbytes, self._stream))
        _check("cuEventRecord", driver.record(self._event, self._stream))


class _Driver(NamedTuple):
    """The calls that every piece takes.

    Those that return at once keep Python's lock: torch's own, and cuda-bindings', give it away each time, and a thread
    waits longer to have it back than the call takes.

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
    keeping, giving = ctypes.PyDLL("libcuda.so.1"), ctypes.CDLL("libcuda.so.1")
    copy, record, query, wait = (
        keeping.cuMemcpyHtoDAsync_v2,
        keeping.cuEventRecord,
        keeping.cuEventQuery,
        giving.cuEventSynchronize,
    )
    copy.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    record.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    query.argtypes = wait.argtypes = (ctypes.c_void_p,)
    return _Driver(copy, record, query, wait)


def _cut(pairs: Sequence[tuple[torch.Tensor | FileStretch, torch.Tensor]]) -> Iterator[_Piece]:
    for number, (source, target) in enumerate(pairs):
        first = source if isinstance(source, FileStretch) else source.data_ptr()
        for at in range(0, source.nbytes, _PIECE_BYTES):
            yield _Piece(number, first, at, target.data_ptr() + at, min(_PIECE_BYTES, source.nbytes - at))
