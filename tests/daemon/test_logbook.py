from __future__ import annotations

import io
import logging

import pytest

from xditd.daemon.logbook import MAX_ANSWER_CHARS, MAX_LINE_CHARS, Logbook, LogbookHandler, human_bytes
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
    for number in range(limits.MAX_LOG_LINES + 10):
        book.add(str(number))
    lines, next_line = book.since(0)
    assert lines[0] == "10"
    assert len(lines) == limits.MAX_LOG_LINES
    assert next_line == limits.MAX_LOG_LINES + 10


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
