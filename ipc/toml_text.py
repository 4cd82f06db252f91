"""Read the TOML of a user's files, however absurd: ``tomllib`` takes minutes for a key of 60,000 dots."""

from __future__ import annotations

import re
import sys
from typing import Any, Final

_MAX_DOTS: Final = 64
"""In one line outside of quotes. Our keys have at most three parts, and tomllib's time grows with the square."""

# The last alternative is a string without an end, of which tomllib says so: without it, each quote would scan the rest.
_QUOTED_OR_COMMENT: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|["\'].*', re.DOTALL
)


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a text.

    Raises:
        ValueError: it is no TOML; or it has a key of very many parts, tables in tables without end, or a number that
            Python does not print. The message has no file.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    _check_dots(text)
    try:
        tables: dict[str, Any] = tomllib.loads(text)
        repr(tables)  # messages show values, and Python refuses to show numbers of more than 4,300 digits
    except RecursionError:
        raise ValueError("lists or tables within one another, too deep to read") from None
    return tables


def _check_dots(text: str) -> None:
    plain = _QUOTED_OR_COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(plain.split("\n"), 1):
        dots = line.count(".")
        if dots > _MAX_DOTS:
            shown = line.strip()[:40]
            raise ValueError(f"line {number}, {shown}...: {dots} dots outside of quotes; a key has three parts at most")
