from __future__ import annotations

import io
import os

from xditd.daemon.logbook import Logbook
from xditd.daemon.loop import Loop
from xditd.daemon.worker_output import WorkerOutput


def read_all(pieces: list[bytes]) -> tuple[list[str], str]:
    loop, book = Loop(), Logbook(io.StringIO())
    read_end, write_end = os.pipe()
    output = WorkerOutput(loop, book, read_end)
    for piece in pieces:
        os.write(write_end, piece)
        loop.call_later(0.01, loop.stop)
        loop.run(lambda: None)
    os.close(write_end)
    output.close()
    loop.close()
    return book.since(0)[0], output.last_line


def test_lines_come_whole_however_they_were_written() -> None:
    assert read_all([b"one\ntw", b"o\n\n", b"three"]) == (["one", "two", "three"], "three")


def test_bytes_that_are_no_text_do_not_matter() -> None:
    lines, _ = read_all([b"\xff\xfe broken\n"])
    assert lines[0].endswith("broken")


def test_line_without_end_is_cut() -> None:
    lines, _ = read_all([b"x" * 40_000] * 3)
    assert len(lines) == 2
