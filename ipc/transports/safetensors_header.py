"""Read the header of a safetensors file: name, dtype, shape and offset of each tensor.

The safetensors package returns tensors, but lending needs offsets. Only the header of the file is read.

Source: safetensors README, "Format".
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from typing import Any, Final

from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.field_types import ITEM_BYTES, DType
from xditd.ipc.file_kinds import START_BYTES, kind_of
from xditd.ipc.transports.stored_tensors import Header, StoredTensor, check_coverage

_DTYPES: Final[dict[str, DType]] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


def read_header(fd: int, path: str) -> Header:
    """Read and check the header of an open safetensors file.

    Raises:
        BadCheckpoint: not safetensors, truncated, or offsets that overlap, leave gaps or are outside the file; the
            message names the file and the tensor.
    """
    file_bytes = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if os.pread(fd, 1, 8) != b"{" or length > limits.MAX_SAFETENSORS_HEADER_BYTES:
        found = kind_of(os.pread(fd, START_BYTES, 0), file_bytes)
        if found is not None:
            raise BadCheckpoint(f"{path}: this is {found}")
    if len(prefix) < 8:
        raise BadCheckpoint(f"{path}: {file_bytes} bytes; a safetensors file starts with 8 bytes of header length")
    if length > limits.MAX_SAFETENSORS_HEADER_BYTES:
        raise BadCheckpoint(
            f"{path}: header of {length} bytes; at most {limits.MAX_SAFETENSORS_HEADER_BYTES} are read; "
            "is this a safetensors file?"
        )
    if 8 + length > file_bytes:
        raise BadCheckpoint(
            f"{path}: header of {length} bytes in a file of {file_bytes}; the file is truncated: get it again"
        )
    entries = _parse(os.pread(fd, length, 8), path)
    tensors = tuple(_stored(name, entry, 8 + length, path) for name, entry in entries.items() if name != "__metadata__")
    check_coverage(tensors, path, data_start=8 + length, file_bytes=file_bytes)
    metadata = entries.get("__metadata__")
    texts = metadata if isinstance(metadata, dict) else {}  # whatever else is there, no tensor depends on it
    return Header(8 + length, tensors, {key: text for key, text in texts.items() if isinstance(text, str)})


def _parse(text: bytes, path: str) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise BadCheckpoint(f"{path}: a name appears twice in the header")
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path}: header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise BadCheckpoint(f"{path}: header is not a JSON object")
    count = len(entries) - ("__metadata__" in entries)
    if count > limits.MAX_TENSORS:
        raise BadCheckpoint(f"{path}: {count} tensors; at most {limits.MAX_TENSORS} can be lent")
    return entries


def _stored(name: str, entry: Any, data_start: int, path: str) -> StoredTensor:
    def refuse(why: str) -> BadCheckpoint:
        return BadCheckpoint(f"{path}: tensor {reprlib.repr(name)}: {why}")

    if not 1 <= len(name) <= limits.MAX_NAME_CHARS or not _is_unicode(name):
        raise refuse(f"a name has 1 to {limits.MAX_NAME_CHARS} Unicode characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("an entry has exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise refuse(f"dtype {reprlib.repr(entry['dtype'])} is not one of {', '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > limits.MAX_RANK:
        raise refuse(f"shape {reprlib.repr(shape)} is not a list of at most {limits.MAX_RANK} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {reprlib.repr(offsets)} are not [begin, end]")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise refuse(f"{offsets[1] - offsets[0]} bytes, but {dtype} {shape} needs {expected}")
    return StoredTensor(name, dtype, tuple(shape), data_start + offsets[0], expected)


def _is_unicode(text: str) -> bool:
    """JSON can contain half of a surrogate pair, which no message can carry."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= limits.MAX_BYTES for value in values)
