from __future__ import annotations

import io
import logging
import re

import pytest

from xditd.daemon.operations.logbook import (
    MAX_ANSWER_CHARS,
    MAX_LINE_CHARS,
    Logbook,
    LogbookHandler,
    Shelf,
    human_bytes,
)
from xditd.ipc import limits


def test_lines_are_numbered_and_read_on_from_there() -> None:
    book = Logbook(io.StringIO())
    for line in ("a", "b", "c"):
        book.add(line)
    assert book.since(0) == (["a", "b", "c"], 3)
    assert book.since(2) == (["c"], 3)
    assert book.since(3) == ([], 3)
    assert book.since(10**18) == ([], 3)


def test_old_lines_are_dropped_and_numbers_go_on() -> None:
    book = Logbook(io.StringIO())
    room = Shelf.REQUESTS.value
    for number in range(room + 10):
        book.add(str(number))
    lines, next_line = book.since(0)
    assert lines[0] == "10"
    assert len(lines) == room
    assert next_line == room + 10


@pytest.mark.parametrize("flood", ["warnings", "requests", "worker lines", "worker warnings"])
def test_a_flood_of_one_kind_pushes_out_no_other(flood: str) -> None:
    book = Logbook(io.StringIO())
    handler = LogbookHandler(book)

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
    book = Logbook(io.StringIO())
    order = [Shelf.WARNINGS, Shelf.LIFE, Shelf.WORKERS, Shelf.REQUESTS, Shelf.LIFE]
    for number, shelf in enumerate(order):
        book.add(str(number), shelf)
    assert book.since(0) == (["0", "1", "2", "3", "4"], 5)
    assert book.since(3) == (["3", "4"], 5)


def test_worker_lines_carry_a_time() -> None:
    book = Logbook(io.StringIO())
    book.add_output("INFO rank0 xditd.gpu_workers.process.rank: rank started")
    (line,), _ = book.since(0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO rank0 .*", line)


def test_one_answer_is_bounded_and_the_next_goes_on() -> None:
    book = Logbook(io.StringIO())
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

    book = Logbook(Closed())
    book.add("kept")
    assert book.since(0)[0] == ["kept"]


def test_message_cannot_forge_a_line() -> None:
    book = Logbook(io.StringIO())
    logger = logging.Logger("test")
    logger.addHandler(LogbookHandler(book))
    logger.warning("label=%s", "x\nERROR forged\r")
    (line,), _ = book.since(0)
    assert line.endswith(r"label=x\nERROR forged\r")


def test_traceback_keeps_its_lines() -> None:
    book = Logbook(io.StringIO())
    logger = logging.Logger("test")
    logger.addHandler(LogbookHandler(book))
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
