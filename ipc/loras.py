"""Descriptions of lent LoRAs: which tensors are the two factors of which layer's difference."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Final, Literal, Protocol

import msgspec

from xditd.ipc import limits
from xditd.ipc.field_types import Described, Name

LoraPart = Literal["model", "text_encoder"]
"""What a layer is part of: the transformer or UNet, or one of the text encoders."""

MAX_SCALE: Final = 1e6
Scale = Annotated[float, msgspec.Meta(ge=-MAX_SCALE, le=MAX_SCALE)]
"""A strength, or the alpha of a layer over its rank: no infinity, and no NaN."""

MAX_OUTPUTS: Final = 2**31
"""Bound of the number of a layer's outputs."""

FACTOR_DTYPES: Final = ("float32", "bfloat16", "float16")


class TensorLike(Protocol):
    """A tensor without its bytes."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class LoraLayer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One layer of a LoRA: with strength s, ``s * scale * up @ down`` is added to the layer's weight.

    ``target`` is the layer's name as the file spells it, without prefixes, and with ``_`` for dots, as kohya's scripts
    write it. ``down`` (rank, inputs) and ``up`` (outputs, rank) are names of tensors in the manifest. With ``start``,
    the rows of ``up`` are those of some outputs of the layer, from this one on: such as the keys of a fused projection.
    """

    target: Name
    part: LoraPart
    down: Name
    up: Name
    scale: Scale
    start: Annotated[int, msgspec.Meta(ge=0, le=MAX_OUTPUTS)] | None = None


class LoraDescription(Described, frozen=True, kw_only=True):
    """The layers of a LoRA. All tensors of its manifest are factors of one of them.

    With ``as_class`` their names are those of a module that runs as its class, and no family has to know them. With
    ``keeps_dtypes`` factors are those of layers of PEFT, and compute in their own dtypes; others are converted into
    those of the layers' weights, as PEFT does when it loads them.
    """

    as_class: bool = False
    keeps_dtypes: bool = False
    layers: Annotated[tuple[LoraLayer, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_TENSORS)]


def lora_faults(layers: Collection[LoraLayer], tensors: Mapping[str, TensorLike]) -> list[str]:
    """List what is wrong with the factors of a LoRA, as sentences; empty if they fit together."""
    found: list[str] = []
    seen: set[tuple[LoraPart, str, int | None]] = set()
    for layer in layers:
        if (layer.part, layer.target, layer.start) in seen:
            found.append(f"layer {layer.target} is listed twice, the second time by {layer.down}")
        seen.add((layer.part, layer.target, layer.start))
        missing = [name for name in (layer.down, layer.up) if name not in tensors]
        if missing:
            found.append(f"layer {layer.target} has no tensor {missing[0]}")
            continue
        down, up = tensors[layer.down], tensors[layer.up]
        for name, tensor in ((layer.down, down), (layer.up, up)):
            if tensor.dtype not in FACTOR_DTYPES:
                found.append(f"tensor {name} is {tensor.dtype}, not {', '.join(FACTOR_DTYPES)}")
        if len(down.shape) != 2 or len(up.shape) != 2 or 0 in (*down.shape, *up.shape):
            found.append(
                f"tensors {layer.down} {list(down.shape)} and {layer.up} {list(up.shape)} are not two matrices, "
                "(rank, inputs) and (outputs, rank), of at least one number"
            )
        elif down.shape[0] != up.shape[1]:
            found.append(
                f"tensor {layer.down} {list(down.shape)} has rank {down.shape[0]}, but {layer.up} {list(up.shape)} has "
                f"rank {up.shape[1]}"
            )
    return found
