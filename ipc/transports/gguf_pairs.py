"""Read the start of a GGUF file: its numbers and strings, and the key-value pairs that describe the tensors.

Most pairs are skipped: they describe language models. No number is trusted before it was compared with the size of the
file, and no number alone decides how much memory is allocated.

Source: ggml, ``docs/gguf.md``.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint

ARCHITECTURE: Final = "general.architecture"
ALIGNMENT: Final = "general.alignment"
SPLIT_COUNT: Final = "split.count"
ORIGINAL_SHAPE: Final = "comfy.gguf.orig_shape."

DEFAULT_ALIGNMENT: Final = 32
MIN_ALIGNMENT: Final = 8
MAX_ALIGNMENT: Final = 2**20
"""The largest alignment. ggml has the same limits, and refuses all but powers of 2, too."""
_MAX_KEY_BYTES: Final = 2**16 - 1
_FIRST_READ_BYTES: Final = 64 * 1024

UINT32: Final = 4
INT32: Final = 5
STRING: Final = 8
ARRAY: Final = 9
_VALUE_BYTES: Final[Mapping[int, int]] = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, INT32: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type, where they are always the same."""
_INTEGERS: Final[Mapping[int, bool]] = {
    0: False,
    1: True,
    2: False,
    3: True,
    UINT32: False,
    INT32: True,
    10: False,
    11: True,
}
"""Whether an integer type is signed."""


class GgufReader:
    """Reads a file from its start. ``part`` says, for errors, what is read."""

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self.file_bytes = os.fstat(fd).st_size
        self.at = 0
        self.part = "its start"
        self.array_values = 0
        """How many values of arrays were read one by one."""
        self._fd = fd
        self._bytes = bytearray()

    def refuse(self, why: str) -> BadCheckpoint:
        """Return the error that names the file and says ``why``."""
        return BadCheckpoint(f"{self.path}: {why}")

    def take(self, count: int) -> bytes:
        """Return the next bytes.

        Raises:
            BadCheckpoint: as :meth:`skip`.
        """
        start = self.at
        self.skip(count)
        return bytes(self._bytes[start : self.at])

    def skip(self, count: int) -> None:
        """Pass over the next bytes.

        Raises:
            BadCheckpoint: the file ends before, or the header is longer than the limit.
        """
        end = self.at + count
        if end > self.file_bytes:
            raise self.refuse(
                f"{self.part} ends at byte {end} of {self.file_bytes}; the file is truncated or damaged: get it again"
            )
        if end > limits.MAX_GGUF_HEADER_BYTES:
            raise self.refuse(
                f"{self.part} ends at byte {end}; a GGUF header has at most {limits.MAX_GGUF_HEADER_BYTES} bytes"
            )
        if end > len(self._bytes):
            self._read_until(end)
        self.at = end

    def number(self, size_bytes: int, *, is_signed: bool = False) -> int:
        """Return the next integer, little endian.

        Raises:
            BadCheckpoint: as :meth:`skip`.
        """
        return int.from_bytes(self.take(size_bytes), "little", signed=is_signed)

    def text(self, max_bytes: int, what: str) -> str:
        """Return the next string: its length in eight bytes, then at most ``max_bytes``; ``what`` names it in errors.

        Raises:
            BadCheckpoint: it is longer, or no UTF-8, or the file ends before.
        """
        length = self.number(8)
        if length > max_bytes:
            raise self.refuse(f"{self.part}: {what} of {length} bytes; at most {max_bytes} are read")
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"{self.part}: {what} {reprlib.repr(raw)} is not UTF-8") from error

    def _read_until(self, end: int) -> None:
        wanted = min(max(end, 2 * len(self._bytes), _FIRST_READ_BYTES), self.file_bytes)
        while len(self._bytes) < wanted:
            piece = os.pread(self._fd, wanted - len(self._bytes), len(self._bytes))
            if not piece:
                raise self.refuse(f"truncated to {len(self._bytes)} bytes while it was read; get it again")
            self._bytes += piece


@dataclass
class GgufPairs:
    """The key-value pairs that a reader of tensors needs. ``original_shapes`` are those before a tool changed them."""

    architecture: str | None = None
    alignment: int = DEFAULT_ALIGNMENT
    original_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def read_pairs(reader: GgufReader, count: int) -> GgufPairs:
    """Read the key-value pairs.

    Raises:
        BadCheckpoint: they are malformed, or the file is one of several.
    """
    found = GgufPairs()
    seen: set[str] = set()
    for number in range(count):
        reader.part = f"key-value pair {number + 1} of {count}"
        key = reader.text(_MAX_KEY_BYTES, "a key")
        if not key:
            raise reader.refuse(f"{reader.part} has an empty key; the file is damaged: get it again")
        reader.part = f"the value of {key!r:.200}"
        if key in seen:
            raise reader.refuse(f"the key {key!r:.200} appears twice")
        seen.add(key)
        kind = reader.number(4)
        if key == ARCHITECTURE:
            _check_kind(reader, kind, STRING, "a string")
            found.architecture = reader.text(limits.MAX_NAME_CHARS, "a string")
        elif key == ALIGNMENT:
            _check_kind(reader, kind, UINT32, "a uint32")
            found.alignment = reader.number(4)
            if not MIN_ALIGNMENT <= found.alignment <= MAX_ALIGNMENT or found.alignment & (found.alignment - 1):
                raise reader.refuse(
                    f"{key} is {found.alignment}, not a power of 2 from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
                )
        elif key == SPLIT_COUNT and kind in _INTEGERS:
            files = reader.number(_VALUE_BYTES[kind], is_signed=_INTEGERS[kind])
            if files > 1:
                raise reader.refuse(
                    f"this is one of the {files} files of a split GGUF: merge them (llama-gguf-split --merge)"
                )
        elif key.startswith(ORIGINAL_SHAPE):
            _check_kind(reader, kind, ARRAY, "an array")
            found.original_shapes[key.removeprefix(ORIGINAL_SHAPE)] = _read_shape(reader)
        else:
            _skip_value(reader, kind)
    return found


def _check_kind(reader: GgufReader, kind: int, expected: int, what: str) -> None:
    if kind != expected:
        raise reader.refuse(f"{reader.part} has the type {kind}; it has to be {what}")


def _read_shape(reader: GgufReader) -> tuple[int, ...]:
    _check_kind(reader, reader.number(4), INT32, "an array of int32")
    count = reader.number(8)
    if count > limits.MAX_RANK:
        raise reader.refuse(f"{reader.part} has {count} dimensions; at most {limits.MAX_RANK} can be lent")
    return tuple(reader.number(4, is_signed=True) for _ in range(count))


def _skip_value(reader: GgufReader, kind: int, depth: int = 0) -> None:
    if kind in _VALUE_BYTES:
        reader.skip(_VALUE_BYTES[kind])
    elif kind == STRING:
        reader.skip(reader.number(8))
    elif kind == ARRAY:
        if depth == limits.MAX_GGUF_NESTING:
            raise reader.refuse(f"{reader.part} has arrays in arrays, more than {depth} deep")
        inner, count = reader.number(4), reader.number(8)
        if inner in _VALUE_BYTES:
            reader.skip(count * _VALUE_BYTES[inner])
            return
        reader.array_values += count
        if reader.array_values > limits.MAX_GGUF_VALUES:
            raise reader.refuse(
                f"{reader.part} ends after {reader.array_values} values in arrays; at most "
                f"{limits.MAX_GGUF_VALUES} are read"
            )
        for _ in range(count):
            _skip_value(reader, inner, depth + 1)
    else:
        raise reader.refuse(f"{reader.part} has the type {kind}, which GGUF does not have")
