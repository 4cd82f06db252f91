from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import re
import threading

import pytest

from xditd.daemon.operations.log_buffer import (
    MAX_ANSWER_CHARS,
    MAX_LINE_CHARS,
    Category,
    LogBuffer,
    LogBufferHandler,
    LogStream,
    human_bytes,
)
from xditd.ipc import limits


def test_lines_are_numbered_and_read_on_from_there() -> None:
    book = LogBuffer(io.StringIO())
    for line in ("a", "b", "c"):
        book.add(line)
    assert book.since(0) == (["a", "b", "c"], 3)
    assert book.since(2) == (["c"], 3)
    assert book.since(3) == ([], 3)
    assert book.since(10**18) == ([], 3)


def test_old_lines_are_dropped_and_numbers_go_on() -> None:
    book = LogBuffer(io.StringIO())
    room = Category.REQUESTS.value
    for number in range(room + 10):
        book.add(str(number))
    lines, next_line = book.since(0)
    assert lines[0] == "10"
    assert len(lines) == room
    assert next_line == room + 10


@pytest.mark.parametrize("flood", ["warnings", "requests", "worker lines", "worker warnings"])
def test_a_flood_of_one_kind_pushes_out_no_other(flood: str) -> None:
    book = LogBuffer(io.StringIO())
    handler = LogBufferHandler(book)

    def log(name: str, level: int, text: str) -> None:
        handler.emit(logging.LogRecord(name, level, "", 0, text, None, None))

    log("xditd.daemon.groups.worker_group", logging.INFO, "2 workers ready")
    for number in range(3 * limits.MAX_LOG_LINES):
        if flood == "warnings":
            log("xditd.daemon.groups.worker_group", logging.WARNING, f"flood {number}")
        elif flood == "requests":
            log("xditd.daemon.front.dispatch", logging.INFO, f"flood {number}")
        else:
            book.add_output(f"WARNING rank0 flood {number}" if flood == "worker warnings" else f"flood {number}")
    lines, next_line = book.since(0)
    assert "2 workers ready" in lines[0]
    assert lines[-1].endswith(f"flood {3 * limits.MAX_LOG_LINES - 1}")
    assert next_line == 3 * limits.MAX_LOG_LINES + 1
    assert len(lines) < limits.MAX_LOG_LINES


def test_kinds_are_read_in_the_order_in_which_they_came() -> None:
    book = LogBuffer(io.StringIO())
    order = [Category.WARNINGS, Category.DAEMON, Category.WORKERS, Category.REQUESTS, Category.DAEMON]
    for number, shelf in enumerate(order):
        book.add(str(number), shelf)
    assert book.since(0) == (["0", "1", "2", "3", "4"], 5)
    assert book.since(3) == (["3", "4"], 5)


def test_worker_lines_carry_a_time() -> None:
    book = LogBuffer(io.StringIO())
    book.add_output("INFO rank0 xditd.gpu_workers.process.rank: rank started")
    (line,), _ = book.since(0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO rank0 .*", line)


def test_one_answer_is_bounded_and_the_next_goes_on() -> None:
    book = LogBuffer(io.StringIO())
    for _ in range(500):
        book.add("x" * 10_000)
    seen = position = 0
    while position < book.next_line:
        lines, position = book.since(position)
        assert lines
        assert sum(map(len, lines)) <= MAX_ANSWER_CHARS
        assert max(map(len, lines)) == MAX_LINE_CHARS
        seen += len(lines)
    assert seen == 500


def test_closed_stream_does_not_matter() -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    book = LogBuffer(Closed())
    book.add("kept")
    assert book.since(0)[0] == ["kept"]


def test_message_cannot_forge_a_line() -> None:
    book = LogBuffer(io.StringIO())
    logger = logging.Logger("test")
    logger.addHandler(LogBufferHandler(book))
    logger.warning("label=%s", "x\nERROR forged\r")
    (line,), _ = book.since(0)
    assert line.endswith(r"label=x\nERROR forged\r")


def test_traceback_keeps_its_lines() -> None:
    book = LogBuffer(io.StringIO())
    logger = logging.Logger("test")
    logger.addHandler(LogBufferHandler(book))
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("went wrong")
    assert book.since(0)[0][-1] == "ValueError: boom"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (22 * 2**30, "22.00 GiB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_a_pipe_that_nobody_reads_loses_lines_and_says_so() -> None:
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    with open(read_fd, encoding="utf-8") as reader, open(write_fd, "w", encoding="utf-8") as writer:
        stream = LogStream(writer)
        for _ in range(100):
            stream.write_line("x" * 200)
        taken = len(os.read(read_fd, 65536)) // 201
        stream.write_line("after")
        assert reader.readline() == (
            f"({100 - taken} lines were dropped: the reader was too slow; xditd logs has the last ones)\n"
        )
        assert reader.readline() == "after\n"
        stream.write_line("\N{SNOWMAN}" * 10_000)  # longer than the pipe: what fits
        assert 0 < len(os.read(read_fd, 65536)) <= 4096


def test_letters_that_the_encoding_escapes_hold_nobody_either() -> None:
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    with open(write_fd, "w", encoding="ascii", errors="backslashreplace") as writer:
        written = threading.Thread(target=LogStream(writer).write_line, args=("\N{GRINNING FACE}" * 900,), daemon=True)
        written.start()
        written.join(10)
        is_over = not written.is_alive()
        os.set_blocking(read_fd, False)
        while written.is_alive():  # unblocks the writer in any case
            with contextlib.suppress(BlockingIOError):
                os.read(read_fd, 65536)
        os.close(read_fd)
        assert is_over


def test_a_full_disk_and_a_stream_without_a_descriptor() -> None:
    with open("/dev/full", "wb", buffering=0) as disk:
        LogStream(io.TextIOWrapper(disk, write_through=True)).write_line("nowhere")
    memory = io.StringIO()
    LogStream(memory).write_line("x" * 5_000)
    assert memory.getvalue() == "x" * 5_000 + "\n"
