from __future__ import annotations

import io
import os

import pytest

from xditd.daemon.groups.worker_output import WorkerOutput
from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.log_buffer import LogBuffer


def read_output(pieces: list[bytes]) -> tuple[list[str], WorkerOutput]:
    loop, book = EventLoop(), LogBuffer(io.StringIO())
    read_end, write_end = os.pipe()
    output = WorkerOutput(loop, book, read_end)
    for piece in pieces:
        os.write(write_end, piece)
        loop.call_later(0.01, loop.stop)
        loop.run(lambda: None)
    os.close(write_end)
    output.close()
    loop.close()
    return [line.split(" ", 2)[2] for line in book.since(0)[0]], output


def read_all(pieces: list[bytes]) -> tuple[list[str], str]:
    lines, output = read_output(pieces)
    return lines, output.last_line


def test_lines_come_whole_however_they_were_written() -> None:
    assert read_all([b"one\ntw", b"o\n\n", b"three"]) == (["one", "two", "three"], "three")


def test_bytes_that_are_no_text_do_not_matter() -> None:
    lines, _ = read_all([b"\xff\xfe broken\n"])
    assert lines[0].endswith("broken")


def test_line_without_end_is_cut() -> None:
    lines, _ = read_all([b"x" * 40_000] * 3)
    assert len(lines) == 2


TRACEBACK = b"""Process SpawnProcess-2:
Traceback (most recent call last):
  File "rank.py", line 83, in main
    layout = start()
             ^^^^^^^
RuntimeError: no such interface
INFO rank0 something else
"""


@pytest.mark.parametrize(
    ("written", "status", "why"),
    [
        (b"", 0, "the group's leader exited without being told to (exit status 0)"),
        (b"noise\n", 3, "the group's leader exited with status 3: noise"),
        (b"", -11, "the group's leader was killed by SIGSEGV: no output"),
        (b"", -99, "the group's leader was killed by signal 99: no output"),
        (TRACEBACK, 1, "the group's leader exited with status 1: RuntimeError: no such interface"),
        (TRACEBACK, -15, "the group's leader was killed by SIGTERM: INFO rank0 something else"),
        (b"worker group: rank 1 was killed by SIGBUS\nnoise\n", 1, "rank 1 was killed by SIGBUS"),
        (TRACEBACK + b"worker group: rank 1 was killed by SIGBUS\n", 1, "rank 1 was killed by SIGBUS"),
        (
            TRACEBACK + b"worker group: rank 1 exited with status 1 and did not say why\n",
            1,
            "rank 1 exited with status 1 and did not say why; last error: RuntimeError: no such interface",
        ),
    ],
)
def test_why_a_group_has_ended(written: bytes, status: int, why: str) -> None:
    _, output = read_output([written])
    assert output.explain(status) == why
