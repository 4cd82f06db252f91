"""``Record``: what it may say, and what is refused when it is read."""

from __future__ import annotations

import json

import pytest
from sample_records import WHOLE

from xditd.client.metadata.record import MAX_BYTES, Record, decode, encode
from xditd.ipc.errors import BadRequest


def test_what_is_written_is_read_again() -> None:
    text = encode(WHOLE)
    assert decode(text.encode(), "x") == WHOLE
    assert list(json.loads(text))[:2] == ["xditd", "version"]
    small = Record(version="1", width=8, height=8, steps=1)
    assert json.loads(encode(small)) == {"xditd": 3, "version": "1", "width": 8, "height": 8, "steps": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "x" * 65_537},
        {"prompt": "\ud800"},
        {"steps": 0},
        {"seed": -1},
        {"guidance": float("nan")},
        {"options": {"x": float("inf")}},
    ],
)
def test_values_that_no_record_may_have_are_not_written(changes: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match=r"metadata: .*--no-metadata"):
        encode(Record(**{"version": "1", "width": 8, "height": 8, "steps": 1, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON|no record of xditd"),
        (b'{"a": NaN}', "no JSON"),
        (b"[]", "no record of xditd"),
        (b"{}", "no record of xditd"),
        (b'{"prompt": "a cat"}', "no record of xditd"),
        (b'{"xditd": 4}', "of schema 4, and this xditd reads 3; install a newer"),
        (b'{"xditd": true}', "no record of xditd"),
        (b'{"xditd": 1}', "missing required field"),
        (b" " * (MAX_BYTES + 1), f"more than {MAX_BYTES} bytes"),
    ],
)
def test_other_texts_are_refused_with_the_file(text: bytes, says: str) -> None:
    with pytest.raises(BadRequest, match=f"cat.png: its metadata .*(?:{says})"):
        decode(text, "cat.png")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", 3),
        ("seed", "7"),
        ("seed", 1.5),
        ("seed", 2**63),
        ("steps", 10**9),
        ("width", 0),
        ("guidance", "high"),
        ("index", -1),
        ("options", {"x": "y"}),
        ("options", {str(number): 1 for number in range(2_000)}),
        ("loras", [{"file": {"name": "../x"}, "strength": 1}]),
        ("loras", [{"file": {"name": "a/b"}, "strength": 1}]),
        ("loras", [{"file": {"name": ".."}, "strength": 1}]),
        ("loras", [{"file": {"name": "a\0"}, "strength": 1}]),
        ("loras", [{"file": {"name": "a"}, "strength": 1e300}]),
        ("loras", [{"file": {"name": "a", "sample": "xyz"}, "strength": 1}]),
        ("loras", [{"file": {"name": "a"}, "strength": 1}] * 65),
        ("unknown", 1),
        ("inputs", {"image": True}),
    ],
)
def test_wrong_values_of_foreign_records_are_refused(key: str, value: object) -> None:
    plain = {**json.loads(encode(WHOLE)), key: value}
    with pytest.raises(BadRequest, match=r"cat\.png: its metadata are no record of xditd"):
        decode(json.dumps(plain).encode(), "cat.png")
