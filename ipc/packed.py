"""Packed weights: how a matrix of numbers is stored in fewer bits, and the check of one against its format.

A packed weight is lent as the bytes that its file has, with its *companions*: the tensors that hold its scales.
``shape`` is the logical one, that of the matrix; rows are its first dimension.

| format | weight | ``scale`` | others |
|---|---|---|---|
| ``float8`` | float8_e4m3fn or float8_e5m2, the logical shape | optional; one, or one for each row | ``input_scale`` |
| ``int8`` | int8 (rows, columns) | one, or one for each row | |
| ``int8_convrot`` | as ``int8``, columns rotated in groups of ``group`` | the same | |
| ``mxfp8`` | float8_e4m3fn (rows, columns) | e8m0 for each 32 columns, in tiles | ``input_scale`` |
| ``nvfp4`` | uint8 (rows, columns / 2), first number in high bits | e4m3 for each 16, in tiles | ``scale_2`` |
| GGUF's types | uint8 (rows, bytes of a row), blocks with their scales inside | | |

Scales in tiles have the layout of cuBLAS: tiles of 128 rows and 4 columns, to which rows and columns are padded.

Sources: comfy-kitchen, ``tensor/*.py``; cuBLAS, "1D Block Scaling Factors Layout"; ggml, ``ggml-common.h``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Final, Literal, NamedTuple, Protocol

import msgspec

from xditd.ipc import limits
from xditd.ipc.field_types import Name, Shape

PackedFormat = Literal[
    "float8",
    "int8",
    "int8_convrot",
    "mxfp8",
    "nvfp4",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
]


class GgufBlock(NamedTuple):
    """How many numbers of a row are in one block, and how many bytes it takes."""

    numbers: int
    size_bytes: int


GGUF_BLOCKS: Final[Mapping[str, GgufBlock]] = {
    "q8_0": GgufBlock(32, 34),
    "q4_0": GgufBlock(32, 18),
    "q4_1": GgufBlock(32, 20),
    "q5_0": GgufBlock(32, 22),
    "q5_1": GgufBlock(32, 24),
    "q2_k": GgufBlock(256, 84),
    "q3_k": GgufBlock(256, 110),
    "q4_k": GgufBlock(256, 144),
    "q5_k": GgufBlock(256, 176),
    "q6_k": GgufBlock(256, 210),
    "iq4_nl": GgufBlock(32, 18),
    "iq4_xs": GgufBlock(256, 136),
}

SCALED_COLUMNS: Final[Mapping[str, int]] = {"mxfp8": 32, "nvfp4": 16}
"""Columns that share a scale, in formats whose scales are in tiles."""
TILE_ROWS: Final = 128
TILE_COLUMNS: Final = 4

MAX_GROUP: Final = 4**5
"""The largest group of ``int8_convrot``: its rotation takes 4 MiB in float32. Files in use have groups of 256."""

_STORED: Final[Mapping[str, tuple[str, ...]]] = {
    "float8": ("float8_e4m3fn", "float8_e5m2"),
    "int8": ("int8",),
    "int8_convrot": ("int8",),
    "mxfp8": ("float8_e4m3fn",),
    "nvfp4": ("uint8",),
}
"""Dtypes of the weight, by format; uint8 in GGUF's."""
_TILED: Final[Mapping[str, tuple[str, ...]]] = {
    "mxfp8": ("float8_e8m0fnu", "uint8"),
    "nvfp4": ("float8_e4m3fn", "uint8"),
}
"""Dtypes of scales in tiles: older files hold the same bytes as uint8."""
_FLOATS: Final = ("float32", "bfloat16", "float16")
_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "int8": ("scale",),
    "int8_convrot": ("scale",),
    "mxfp8": ("scale",),
    "nvfp4": ("scale", "scale_2"),
}
_ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {
    "float8": ("scale", "input_scale"),
    "int8": ("scale",),
    "int8_convrot": ("scale",),
    "mxfp8": ("scale", "input_scale"),
    "nvfp4": ("scale", "scale_2", "input_scale"),
}


class TensorLike(Protocol):
    """A tensor without its bytes; ``dtype`` is torch's own name, such as ``bfloat16``."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class PackedWeight(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The format of one tensor, its logical shape, and the names of its companions.

    ``group`` is that of ``int8_convrot``, else 0. ``quantises_input``: the file allows that the layer's input is
    quantised, too, for a product in eight bits.
    """

    weight: Name
    format: PackedFormat
    shape: Shape
    scale: Name | None = None
    scale_2: Name | None = None
    input_scale: Name | None = None
    group: Annotated[int, msgspec.Meta(ge=0, le=MAX_GROUP)] = 0
    quantises_input: bool = True

    @property
    def companions(self) -> dict[str, str]:
        """The names of its companions, by their field."""
        given = {"scale": self.scale, "scale_2": self.scale_2, "input_scale": self.input_scale}
        return {field: name for field, name in given.items() if name is not None}

    @property
    def names(self) -> tuple[str, ...]:
        """The weight and its companions."""
        return (self.weight, *self.companions.values())

    @property
    def rows(self) -> int:
        """The first side of the logical shape; 1 for a number."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """The numbers of one row."""
        return math.prod(self.shape[1:])

    @property
    def row_step(self) -> int:
        """The step of rows at which a slice may start, so that it is a view of the weight and of every companion."""
        return TILE_ROWS if self.format in SCALED_COLUMNS else 1


def tiled_shape(rows: int, columns: int, shared_by: int) -> tuple[int, int]:
    """Return the shape of scales in tiles, where ``shared_by`` columns share a scale."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // (shared_by * TILE_COLUMNS)) * TILE_COLUMNS


def stored_shape(packed: PackedWeight) -> tuple[int, ...]:
    """Return the shape that the weight's bytes have to have; the logical shape has passed :func:`weight_faults`."""
    block = GGUF_BLOCKS.get(packed.format)
    if block is not None:
        return packed.rows, packed.columns // block.numbers * block.size_bytes
    return (packed.rows, packed.columns // 2) if packed.format == "nvfp4" else packed.shape


def packed_faults(packed: Iterable[PackedWeight], tensors: Mapping[str, TensorLike]) -> list[str]:
    """List what is wrong with packed weights and their companions, as sentences; empty if nothing is.

    ``tensors`` are all that are lent, by name.
    """
    found: list[str] = []
    roles: dict[str, str] = {}
    for each in packed:
        found += weight_faults(each, tensors)
        companion = f"a companion of {each.weight}"
        for name, role in [(each.weight, "a packed weight"), *((name, companion) for name in each.companions.values())]:
            if name in roles:
                found.append(f"tensor {name} is described as {role}, and also as {roles[name]}")
            roles[name] = role
    return found


def weight_faults(packed: PackedWeight, tensors: Mapping[str, TensorLike]) -> list[str]:
    """List what is wrong with one packed weight and its companions, as sentences; empty if nothing is."""
    what = f"tensor {packed.weight}, packed as {packed.format},"
    found = [f"{what} {fault}" for fault in _logical_faults(packed)]
    given = packed.companions
    missing = [name for name in packed.names if name not in tensors]
    found += [f"{what} needs tensor {name}, which is missing" for name in missing]
    found += [f"{what} has no {field}" for field in _NEEDED.get(packed.format, ()) if field not in given]
    found += [
        f"{what} has the {field} {name}, of which this format has none"
        for field, name in given.items()
        if field not in _ALLOWED.get(packed.format, ())
    ]
    return found or [f"{what} {fault}" for fault in _stored_faults(packed, tensors)]


class LogicalTensor(NamedTuple):
    """A tensor as a model sees it: of a packed weight the logical shape, and the dtype ``packed``."""

    dtype: str
    shape: tuple[int, ...]


def logical_tensors(packed: Iterable[PackedWeight], tensors: Mapping[str, TensorLike]) -> dict[str, TensorLike]:
    """Return all tensors but the companions of packed weights, and these with their logical shapes."""
    found = dict(tensors)
    for each in packed:
        for name in each.companions.values():
            found.pop(name, None)
        found[each.weight] = LogicalTensor("packed", each.shape)
    return found


def _logical_faults(packed: PackedWeight) -> Iterator[str]:
    shape = list(packed.shape)
    if math.prod(side or 1 for side in shape) > limits.MAX_BYTES:
        yield f"has the shape {shape}, which is too large for any memory"
        return
    block = GGUF_BLOCKS.get(packed.format)
    if packed.format != "float8" and (not shape or 0 in shape or (block is None and len(shape) != 2)):
        yield f"has the shape {shape}: it has to be a matrix with rows and columns"
        return
    step = SCALED_COLUMNS.get(packed.format) or (block.numbers if block is not None else 1)
    if packed.columns % step:
        yield f"has {packed.columns} columns: they have to be a multiple of {step}"
    if packed.format == "int8_convrot":
        if packed.group < 4 or 4 ** round(math.log(packed.group, 4)) != packed.group:
            yield f"is rotated in groups of {packed.group}: a group is a power of 4"
        elif packed.columns % packed.group:
            yield f"has {packed.columns} columns: they have to be a multiple of its group, {packed.group}"
    elif packed.group:
        yield f"has a group of {packed.group}: only int8_convrot has groups"


def _stored_faults(packed: PackedWeight, tensors: Mapping[str, TensorLike]) -> Iterator[str]:
    weight = tensors[packed.weight]
    dtypes = _STORED.get(packed.format, ("uint8",))
    if weight.dtype not in dtypes:
        yield f"is {weight.dtype}: it has to be {' or '.join(dtypes)}"
    expected = stored_shape(packed)
    if tuple(weight.shape) != expected:
        yield f"is {list(weight.shape)}: the shape {list(packed.shape)} takes {list(expected)} of {dtypes[0]}"
    shapes: list[tuple[int, ...]]
    for field, name in packed.companions.items():
        companion = tensors[name]
        shared_by = SCALED_COLUMNS.get(packed.format) if field == "scale" else None
        if shared_by is not None:
            accepted, shapes = _TILED[packed.format], [tiled_shape(packed.rows, packed.columns, shared_by)]
        else:
            accepted, shapes = _FLOATS, [(), (1,), (1, 1)]
            if field == "scale" and len(packed.shape) == 2:
                shapes += [(packed.rows, 1), (packed.rows,)]
        if companion.dtype not in accepted:
            yield f"has the {field} {name} in {companion.dtype}: it has to be {' or '.join(accepted)}"
        if tuple(companion.shape) not in shapes:
            expects = " or ".join(str(list(shape)) for shape in (shapes[0], *shapes[3:4]))  # one, or one for each row
            yield f"has the {field} {name} of shape {list(companion.shape)}: it has to be {expects}"
