"""Read the header of a GGUF file: name, type, shape and offset of each tensor.

A file is a list of key-value pairs, a list of tensors, and their bytes, each tensor aligned. Tensors of numbers (F32,
BF16 and so on) are read as plain ones; those in blocks, as uint8 (rows, bytes of a row) and a ``PackedWeight``. Only
the header is read, piece by piece, and no number in it is trusted before it was compared with the size of the file.

Sources: ggml, ``docs/gguf.md`` and ``src/gguf.cpp``; ComfyUI-GGUF, ``tools/convert.py`` (original shapes) and
``tools/fix_5d_tensors.py`` (five dimensions, where ggml has four).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.field_types import ITEM_BYTES, DType
from xditd.ipc.packed import GGUF_BLOCKS, PackedFormat, PackedWeight
from xditd.ipc.transports.gguf_pairs import ARCHITECTURE, GgufPairs, GgufReader, read_pairs
from xditd.ipc.transports.stored_tensors import Header, StoredTensor, check_coverage
from xditd.ipc.transports.tensor_views import align

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_DIMENSIONS: Final = 5

_PLAIN: Final[Mapping[int, DType]] = {
    0: "float32",
    1: "float16",
    24: "int8",
    25: "int16",
    26: "int32",
    27: "int64",
    28: "float64",
    30: "bfloat16",
}
_PACKED: Final[Mapping[int, PackedFormat]] = {
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    20: "iq4_nl",
    23: "iq4_xs",
}
_REFUSED: Final[Mapping[int, str]] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
"""Types of tensors, by their number in ``ggml_type``."""


def read_header(fd: int, path: str) -> Header:
    """Read and check the header of an open GGUF file of version 2 or 3, little endian.

    Raises:
        BadCheckpoint: not GGUF, truncated, one of several files, of a type that no worker can read, or with tensors
            that overlap, leave gaps or are outside the file; the message names the file and the tensor.
    """
    reader = GgufReader(fd, path)
    _check_version(reader)
    reader.part = "its counts"
    tensor_count, pair_count = reader.number(8), reader.number(8)
    if tensor_count > limits.MAX_TENSORS:
        raise reader.refuse(f"{tensor_count} tensors; at most {limits.MAX_TENSORS} can be lent")
    if pair_count > limits.MAX_GGUF_PAIRS:
        raise reader.refuse(f"{pair_count} key-value pairs; at most {limits.MAX_GGUF_PAIRS} are read")
    pairs = read_pairs(reader, pair_count)
    infos = _read_infos(reader, tensor_count)
    data_start = align(reader.at, pairs.alignment)
    found = [_stored(info, data_start, pairs, reader) for info in infos]
    tensors = tuple(stored for stored, _ in found)
    check_coverage(tensors, path, data_start=data_start, file_bytes=reader.file_bytes, alignment=pairs.alignment)
    return Header(
        reader.at,
        tensors,
        {} if pairs.architecture is None else {ARCHITECTURE: pairs.architecture},
        tuple(packed for _, packed in found if packed is not None),
    )


class _Info(NamedTuple):
    """One entry of the list of tensors; ``sides`` begins with the innermost dimension."""

    name: str
    sides: tuple[int, ...]
    kind: int
    offset_bytes: int


def _check_version(reader: GgufReader) -> None:
    magic = reader.take(4)
    if magic != MAGIC:
        raise reader.refuse(f"begins with {magic!r}; a GGUF file begins with {MAGIC!r}")
    version = reader.number(4)
    if version and version % 2**16 == 0:  # as ggml recognizes them: no version number is that large
        raise reader.refuse("a GGUF file in big-endian byte order; get the little-endian one, or convert it")
    if version not in _VERSIONS:
        age = "a newer" if version < min(_VERSIONS) else "an older"
        raise reader.refuse(f"a GGUF file of version {version}; versions 2 and 3 are read: get {age} file")


def _read_infos(reader: GgufReader, count: int) -> list[_Info]:
    infos: dict[str, _Info] = {}
    for number in range(count):
        reader.part = f"tensor {number + 1} of {count}"
        name = reader.text(4 * limits.MAX_NAME_CHARS, "a name")
        if not 1 <= len(name) <= limits.MAX_NAME_CHARS:
            raise reader.refuse(f"{reader.part}: a name has 1 to {limits.MAX_NAME_CHARS} characters, not {len(name)}")
        reader.part = f"tensor {name!r:.200}"
        if name in infos:
            raise reader.refuse(f"{reader.part} is listed twice")
        rank = reader.number(4)
        if rank > _MAX_DIMENSIONS:
            raise reader.refuse(f"{reader.part}: {rank} dimensions; a tensor has at most {_MAX_DIMENSIONS}")
        sides = tuple(reader.number(8) for _ in range(rank))
        if any(not 1 <= side <= limits.MAX_BYTES for side in sides):
            raise reader.refuse(f"{reader.part}: dimensions {list(sides)}; each is 1 to {limits.MAX_BYTES}")
        infos[name] = _Info(name, sides, reader.number(4), reader.number(8))
    return [*infos.values()]


def _stored(
    info: _Info, data_start: int, pairs: GgufPairs, reader: GgufReader
) -> tuple[StoredTensor, PackedWeight | None]:
    def refuse(why: str) -> BadCheckpoint:
        return reader.refuse(f"tensor {info.name!r:.200}: {why}")

    count = math.prod(info.sides)
    shape = pairs.original_shapes.get(info.name, info.sides[::-1])
    if any(side < 1 for side in shape) or math.prod(shape) != count:
        raise refuse(f"its original shape {list(shape)} is not that of {count} numbers")
    if info.offset_bytes % pairs.alignment:
        raise refuse(f"its offset, {info.offset_bytes}, is not a multiple of the file's alignment, {pairs.alignment}")
    start = data_start + info.offset_bytes
    dtype = _PLAIN.get(info.kind)
    if dtype is not None:
        return StoredTensor(info.name, dtype, shape, start, count * ITEM_BYTES[dtype]), None
    packed = _PACKED.get(info.kind)
    if packed is None:
        what = f"{_REFUSED[info.kind]}, which no worker can read" if info.kind in _REFUSED else "which is not known"
        known = ", ".join(name.upper() for name in GGUF_BLOCKS)
        raise refuse(f"its type is {info.kind}, {what}; get a file in {known}, BF16 or F16")
    if len(shape) < 2:
        raise refuse(f"its shape is {list(shape)}, and only matrices can be packed, as {packed} here")
    block = GGUF_BLOCKS[packed]
    columns = math.prod(shape[1:])
    # In the file a row is the innermost dimension; original shapes may have rows of another length.
    for length, whose in (((*info.sides, 1)[0], "rows"), (columns, "original rows")):
        if length % block.numbers:
            raise refuse(f"{whose} of {length} numbers are not a multiple of {block.numbers}, the block of {packed}")
    row_bytes = columns // block.numbers * block.size_bytes
    stored = StoredTensor(info.name, "uint8", (shape[0], row_bytes), start, shape[0] * row_bytes)
    return stored, PackedWeight(info.name, packed, shape)
