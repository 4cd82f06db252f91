"""Read what a checkpoint says of its packed layers: markers beside the weights, and the header's metadata.

| where | what it says |
|---|---|
| ``LAYER.comfy_quant`` | JSON as uint8: the format of a layer and its parameters |
| ``_quantization_metadata`` in the header | JSON: the same for all layers, by name |
| ``PREFIX.scaled_fp8`` | the layers below are fp8 with ``scale_weight``; of two elements: not to be multiplied in fp8 |

Sources: ComfyUI, ``QUANTIZATION.md``, ``comfy/utils.py`` (``convert_old_quants``), ``comfy/ops.py``
(``_load_quantized_module``), ``comfy/quant_ops.py`` (``QUANT_ALGOS``).
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.packed import MAX_GROUP, PackedFormat, TensorLike

MARKER: Final = ".comfy_quant"
OLD_MARKER: Final = "scaled_fp8"
METADATA: Final = "_quantization_metadata"

MAX_MARKER_BYTES: Final = 4_096
"""The longest JSON of one layer; those in use have 28 to 100 bytes."""
_OLD_SIZES: Final = (0, 1, 2)
"""How many elements a marker ``scaled_fp8`` may have."""

_FORMATS: Final[Mapping[str, PackedFormat]] = {
    "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
    "int8_tensorwise": "int8",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
_REDUNDANT: Final = frozenset({"orig_dtype", "orig_shape", "per_row", "group_size"})
"""Parameters that repeat what shapes show, or say what the weights were before."""
_KNOWN: Final = frozenset({"format", "params", "full_precision_matrix_mult", "convrot", "convrot_groupsize"})
_DEFAULT_GROUP: Final = 256
"""The group of a rotated layer whose marker names none, as in ComfyUI."""


def name_in_markers(packed_format: PackedFormat, dtype: str) -> str:
    """Return the name that markers, and ComfyUI, have for a format; ``dtype`` is that of the weight."""
    if packed_format == "float8":
        return dtype
    return "int8_tensorwise" if packed_format.startswith("int8") else packed_format


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """What a marker says of one layer. ``stored_as`` is the dtype of its weight, if the marker says that, too."""

    format: PackedFormat
    group: int = 0
    quantises_input: bool = True
    stored_as: str | None = None


def marker_names(names: Iterable[str]) -> list[str]:
    """Return the names of markers among the names of tensors."""
    return [name for name in names if name.endswith(MARKER) or is_old_marker(name)]


def is_old_marker(name: str) -> bool:
    return name == OLD_MARKER or name.endswith("." + OLD_MARKER)


def read_marker(name: str, content: bytes) -> LayerFormat:
    """Read the marker ``name`` of one layer.

    Raises:
        BadCheckpoint: it is not such a marker.
        Unsupported: its format, or one of its parameters, is not known.
    """
    what = f"tensor {name}"
    return _layer_format(what, _parsed(what, content.decode("utf-8", "replace")))


def check_marker(name: str, tensor: TensorLike) -> None:
    """Check the dtype and size of a marker, before its content is read.

    Raises:
        BadCheckpoint: it cannot be a marker.
    """
    count = math.prod(tensor.shape)
    if tensor.dtype != "uint8" or len(tensor.shape) != 1 or not 2 <= count <= MAX_MARKER_BYTES:
        raise BadCheckpoint(
            f"tensor {name} is {tensor.dtype} {list(tensor.shape)}: a marker is JSON in uint8 of 2 to "
            f"{MAX_MARKER_BYTES} bytes"
        )


def allows_fp8_products(name: str, tensor: TensorLike) -> bool:
    """Return whether layers below an old marker may be multiplied in fp8.

    Raises:
        BadCheckpoint: it cannot be a marker.
    """
    count = math.prod(tensor.shape)
    if count not in _OLD_SIZES:
        raise BadCheckpoint(f"tensor {name} is {list(tensor.shape)}: a marker of scaled fp8 has at most two elements")
    return count < max(_OLD_SIZES)


def read_metadata(text: str, where: str) -> dict[str, LayerFormat]:
    """Read ``_quantization_metadata``: the format of each layer, by its name.

    Raises:
        BadCheckpoint, Unsupported: as :func:`read_marker`.
    """
    what = f"{METADATA} of {where}"
    layers = _parsed(what, text).get("layers")
    if not isinstance(layers, dict):
        raise BadCheckpoint(f"{what} has no layers")
    return {name: _layer_format(f"{what}, layer {name!r:.200}", config) for name, config in layers.items()}


def _parsed(what: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{what} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{what} is {reprlib.repr(found)}, not a JSON object")
    return found


def _layer_format(what: str, config: object) -> LayerFormat:
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{what}: {reprlib.repr(config)} is not a JSON object")
    name = config.get("format")
    packed_format = _FORMATS.get(name) if isinstance(name, str) else None
    if packed_format is None:
        raise Unsupported(
            f"{what}: the format {reprlib.repr(name)} cannot be run; known formats are {', '.join(_FORMATS)}: "
            "lend another file of this model"
        )
    inner = config.get("params", {})
    if not isinstance(inner, dict):
        raise BadCheckpoint(f"{what}: params {reprlib.repr(inner)} are not a JSON object")
    known = _KNOWN if packed_format == "int8" else _KNOWN - {"convrot", "convrot_groupsize"}
    unknown = sorted((set(config) | set(inner)) - known - _REDUNDANT)
    if unknown:
        raise Unsupported(
            f"{what}: the parameters {', '.join(map(reprlib.repr, unknown[:5]))} of {name} are not known: lend another "
            "file of this model",
            names=[repr(each)[1:-1][:200] for each in unknown],
        )
    given = inner | config
    group = 0
    if _flag(what, given, "convrot"):
        packed_format, group = "int8_convrot", given.get("convrot_groupsize", _DEFAULT_GROUP)
        if type(group) is not int or not 0 < group <= MAX_GROUP:
            raise BadCheckpoint(f"{what}: convrot_groupsize {reprlib.repr(group)} is not a number of 1 to {MAX_GROUP}")
    quantises_input = not _flag(what, given, "full_precision_matrix_mult")
    return LayerFormat(packed_format, group, quantises_input, name if packed_format == "float8" else None)


def _flag(what: str, config: Mapping[str, object], name: str) -> bool:
    found = config.get(name, False)
    if not isinstance(found, bool):
        raise BadCheckpoint(f"{what}: {name} {reprlib.repr(found)} is neither true nor false")
    return found
