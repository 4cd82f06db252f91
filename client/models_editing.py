"""Add a model to the text of ``models.toml`` and remove one, and keep all else of it: comments, order and spelling.

Each change is made in the text, and read again: if it says anything but the change, nothing is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from xditd.client.models_file import check_name, parse, read_text
from xditd.client.output_files import write_file
from xditd.ipc.errors import BadRequest

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def add(name: str, table: Mapping[str, Any], path: Path, *, is_replaced: bool = False) -> None:
    """Append a model to the file, which is made if there is none. ``table`` has what TOML takes, as a model has it.

    Raises:
        BadRequest: the file has a model of this name, and it is not ``is_replaced``; or it cannot be read.
        OutputFailed: the file cannot be written; it is unchanged.
    """
    check_name(name)
    text = read_text(path)
    tables = parse(text, path)
    if name in tables:
        if not is_replaced:
            raise BadRequest(f"model {name}: is in {path} already; replace it by --replace, or choose another name")
        text = _without(text, name, path)
    head = f"[{_key(name)}]\n"
    body = "".join(f"{_key(key)} = {_value(value)}\n" for key, value in table.items())
    changed = f"{text.rstrip()}\n\n{head}{body}" if text.strip() else f"{head}{body}"
    _write(changed, {**tables, name: dict(table)}, path, f"[{name}]")


def remove(path: Path, *names: str) -> None:
    """Remove models and the comment lines right above them, at once. Nothing but the file's text changes.

    Raises:
        BadRequest: the file spells one so that it cannot be cut out; all stay.
        OutputFailed: the file cannot be written; it is unchanged.
    """
    text = read_text(path)
    tables = parse(text, path)
    assert tables.keys() >= set(names)
    for name in names:
        text = _without(text, name, path)
    _write(text, {key: table for key, table in tables.items() if key not in names}, path, f"[{'], ['.join(names)}]")


def _write(text: str, expected: Mapping[str, Any], path: Path, what: str) -> None:
    try:
        is_as_expected = parse(text, path) == expected
    except BadRequest:
        is_as_expected = False
    if not is_as_expected:
        raise BadRequest(f"file {path}: {what} is spelled so that it cannot be changed by a program; edit the file")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"file {path}: {what} has a path that is no UTF-8, {error.object[error.start - 20 : error.end]!r}: "
            "rename it, or link to it by another name"
        ) from error
    write_file(path, data)


def _without(text: str, name: str, path: Path) -> str:
    """Return the text without the lines of a model: from each of its headers to the next one's comments."""
    lines = text.splitlines(keepends=True)
    headers = [(number, _header(line, path)) for number, line in enumerate(lines)]
    starts = [(number, key) for number, key in headers if key is not None]
    dropped: set[int] = set()
    for place, (number, key) in enumerate(starts):
        if key != name:
            continue
        end = starts[place + 1][0] if place + 1 < len(starts) else len(lines)
        if place + 1 < len(starts):
            while end > number + 1 and _is_comment(lines[end - 1]):
                end -= 1
        first = number
        while first and _is_comment(lines[first - 1]):
            first -= 1
        if first == 0:  # the file's own head stays
            first = number
        dropped.update(range(first, end))
    return "".join(line for number, line in enumerate(lines) if number not in dropped)


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _header(line: str, path: Path) -> str | None:
    """Return the first name in a line that looks like the header of a table; ``None`` for other lines."""
    if not line.lstrip().startswith("["):
        return None
    try:
        found = parse(line, path)
    except BadRequest:
        return None
    return next(iter(found), None)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {_value(each)}' for key, each in value.items())} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
