"""Hold the tensors of a text encoder as stock ComfyUI would hold them.

Stock holds each encoder in one dtype: layers with a format of their own stay packed, all other tensors are cast to it.
It computes in float32, into which it dequantises every packed weight, whatever the device can multiply.

| tensors of the file | stock | here |
|---|---|---|
| with a format of their own: fp8 with scales, ``int8_tensorwise``, ``mxfp8``, ``nvfp4`` | packed | packed |
| of these an int8 table of tokens | looked up rows are rounded to the encoder's dtype | the whole table is |
| all others | cast to the encoder's dtype, which may be fp8 | the same |

Sources: ComfyUI 0.33, ``comfy/sd1_clip.py`` (``SDClipModel``), ``comfy/ops.py`` (``mixed_precision_ops``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from xditd.client.comfyui.merging import quantised_tensor
from xditd.client.comfyui.packed_tensors import LendableTensors, find_packed, lendable_tensors
from xditd.client.comfyui.stock_dtypes import cast_as_stock
from xditd.client.packed_markers import MARKER
from xditd.ipc.tensors import ComputeDType
from xditd.ipc.transports.tensor_views import dtype_name

if TYPE_CHECKING:
    import torch


def hold_encoder(
    tensors: Mapping[str, torch.Tensor],
    label: str,
    dtype: torch.dtype,
    is_table: Callable[[str], bool],
    quantization_metadata: str | None = None,
) -> LendableTensors:
    """Describe the tensors of a text encoder, which stock would hold in ``dtype``; only what is cast is copied.

    ``is_table`` returns whether a tensor is a table of which rows are looked up. ``quantization_metadata`` is the text
    of ``_quantization_metadata`` in the file's header.

    Raises:
        BadCheckpoint, Unsupported: as :func:`~xditd.client.comfyui.packed_tensors.find_packed`.
    """
    packing = find_packed(tensors, label, quantization_metadata)
    own = [
        each
        for each in packing.packed
        if each.companions or each.format != "float8" or each.weight.removesuffix(".weight") + MARKER in tensors
    ]
    kept = {name for each in own for name in each.names} | packing.markers
    found = cast_as_stock(tensors, dict.fromkeys(tensors, dtype), kept)
    lendable = lendable_tensors(
        found, find_packed(found, label, quantization_metadata), lambda packed: packed.quantises_input
    )
    for name, packed in list(lendable.packed.items()):
        if is_table(name) and packed.format in ("int8", "int8_convrot"):
            _dequantise(lendable, name, dtype)
    tables = {name for name, packed in lendable.packed.items() if is_table(name) and packed.scale is not None}
    return dataclasses.replace(lendable, tables=frozenset(tables))


def _dequantise(lendable: LendableTensors, name: str, dtype: torch.dtype) -> None:
    packed, tensors = lendable.packed[name], lendable.group_tensors(name)
    whole: Any = quantised_tensor(packed, tensors, cast("ComputeDType", dtype_name(dtype))).dequantize()
    for each in lendable.group(name):
        del lendable.tensors[each]
    lendable.tensors[name] = whole
    del lendable.packed[name]
    lendable.markers.pop(name.removesuffix(".weight") + MARKER, None)
