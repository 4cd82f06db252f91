from __future__ import annotations

import pytest

from xditd.ipc.toml_text import parse_toml


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (".".join("a" * 60_000) + " = 1", 1),
        ('x = "a"\n[' + ".".join("a" * 60_000) + "]", 2),
        ('x = """\n\n"""\n' + ".".join(['"b"'] * 60_000) + " = 1", 4),
        ("x = {" + " . ".join("a" * 60_000) + " = 1}", 1),
    ],
)
def test_a_key_of_60_000_parts_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ValueError, match=rf"^line {line}, .*: 59999 dots outside of quotes") as error:
        parse_toml(text)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "value", [repr("." * 1000), '"' + "." * 1000 + '"', "1 # " + "." * 1000, "'''\n" + "." * 1000 + "'''"]
)
def test_dots_in_texts_and_comments_are_no_keys(value: str) -> None:
    assert parse_toml(f"a.b = {value}")["a"].keys() == {"b"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = " + "[" * 100_000, "too deep"),
        ("a = " + "9" * 5000, "4300 digits"),
        ("a = 0x" + "f" * 5000, "4300 digits"),
        ('"' + '\\"' * 400_000, "Unterminated string"),
        ("a = '''" + "''\n" * 300_000, "end of document"),
    ],
)
def test_what_python_cannot_read_or_print_is_no_toml(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_toml(text)
