"""Lists in errors: five names in the message, all of them on the error, on the wire and in the log."""

from __future__ import annotations

import pytest

from xditd.daemon.sockets.routers import failed
from xditd.ipc import limits
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.errors import BY_CODE, BadCheckpoint, error_for
from xditd.ipc.name_lists import for_message, in_log_lines, listed
from xditd.ipc.replies import Failed

FULL_SIZE = [f"double_blocks.{number}.img_attn.qkv.weight is float8_e4m3fn" for number in range(780)]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (list("abcde"), "a, b, c, d, e"),
        (list("abcdef"), "a, b, c, d, e and 1 more"),
        ([str(number) for number in range(780)], "0, 1, 2, 3, 4 and 775 more"),
        ((number for number in (3, 1)), "3, 1"),
    ],
)
def test_the_first_five_are_shown_and_the_rest_is_counted(names, text: str) -> None:
    assert listed(names) == text


def test_one_long_name_makes_no_long_message() -> None:
    assert len(listed(["x" * 512] * 9)) < 700


def test_all_names_cross_the_wire() -> None:
    message = failed("r", BadCheckpoint("it broke", names=FULL_SIZE))
    arrived = reply_decoder.decode(encode(message))
    assert isinstance(arrived, Failed)
    error = error_for(arrived.code, arrived.detail, arrived.retry_after_s, arrived.names)
    assert error.names == tuple(FULL_SIZE)


@pytest.mark.parametrize("names", [["x" * 10_000] * 5_000, ["x"] * 100_000, [""] * 5_000])
def test_what_no_message_holds_is_cut_and_can_be_sent(names: list[str]) -> None:
    arrived = reply_decoder.decode(encode(failed("r", BadCheckpoint("it broke", names=names))))
    assert isinstance(arrived, Failed)
    assert arrived.names == for_message(names)
    assert 0 < len(arrived.names) <= limits.MAX_ERROR_NAMES
    assert sum(map(len, arrived.names)) <= limits.MAX_ERROR_NAMES_CHARS


def test_a_log_gets_every_name_in_lines_that_it_keeps_whole() -> None:
    from xditd.daemon.operations.log_buffer import MAX_LINE_CHARS

    lines = list(in_log_lines(FULL_SIZE))
    assert ", ".join(lines) == ", ".join(FULL_SIZE)
    assert max(map(len, lines)) < MAX_LINE_CHARS - 200  # room for the time, the level and the module


@pytest.mark.parametrize("cls", BY_CODE.values())
def test_every_error_can_carry_names(cls) -> None:
    assert cls("it broke", names=["a"]).names == ("a",)
    assert cls("it broke").names == ()
