"""Describe packed weights of ComfyUI's models as they are lent: tensors, markers that say their formats, companions.

The workers read formats from names and markers, as they do in a file. So a checkpoint is brought into one form here:
companions have their new names, and the marker of a layer says whether its input may be quantised as well, which is
what stock ComfyUI does on the same device:

| layer | stock |
|---|---|
| ``int8_tensorwise`` with and without convrot | multiplied in int8, on every device |
| scaled fp8 | multiplied in fp8 where the device can and the file allows it, else dequantised |
| fp8 without scale | dequantised; with ``fp8_e4m3fn_fast`` or ``--fast`` multiplied in fp8 where the device can |
| ``mxfp8``, ``nvfp4`` | multiplied natively where the device can, else dequantised |

Sources: ComfyUI 0.33, ``comfy/ops.py`` (``mixed_precision_ops``, ``fp8_linear``, ``pick_operations``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from xditd.client.packed_markers import MARKER, name_in_markers
from xditd.client.packed_weights import Packing, packing_of_tensors
from xditd.ipc.errors import RequestError, Unsupported, named
from xditd.ipc.packed import SCALED_COLUMNS, PackedWeight

if TYPE_CHECKING:
    import torch

_WEIGHT: Final = ".weight"
_ENDS: Final = {"scale": "_scale", "scale_2": "_scale_2"}
"""What follows a weight's name in the names of its companions; the scale of the input has the layer's name instead."""


@dataclass(frozen=True)
class LendableTensors:
    """The tensors of one model in the form in which they are lent, by name.

    ``packed`` describes the packed weights among ``tensors``, which has their companions, too. ``markers`` are lent
    beside ``tensors``, and only say what these are. ``tables`` are those of ``packed`` that are
    tables with scales, of which rows are looked up: stock patches them in another way than layers.
    """

    tensors: dict[str, torch.Tensor]
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    markers: dict[str, torch.Tensor] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()

    def group(self, name: str) -> tuple[str, ...]:
        """Return the names of a tensor and its companions."""
        return self.packed[name].names if name in self.packed else (name,)

    def group_tensors(self, name: str) -> list[torch.Tensor]:
        """Return a tensor and its companions."""
        return [self.tensors[each] for each in self.group(name)]

    def renamed(self, names: Mapping[str, str]) -> LendableTensors:
        """Return the same tensors by other names; ``names`` has the new one of each."""
        packed = {
            names[name]: msgspec.structs.replace(
                each, weight=names[name], **{role: names[companion] for role, companion in each.companions.items()}
            )
            for name, each in self.packed.items()
        }
        layers = {name.removesuffix(_WEIGHT): new.removesuffix(_WEIGHT) for name, new in names.items()}
        return LendableTensors(
            {names[name]: tensor for name, tensor in self.tensors.items()},
            packed,
            {layers[name.removesuffix(MARKER)] + MARKER: marker for name, marker in self.markers.items()},
            frozenset(names[name] for name in self.tables),
        )

    def logical(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return meta tensors as a model has them: packed weights in ``dtype`` and their logical shapes."""
        import torch

        companions = {name for each in self.packed.values() for name in each.companions.values()}
        return {
            name: torch.empty(self.packed[name].shape, dtype=dtype, device="meta")
            if name in self.packed
            else torch.empty_like(tensor, device="meta")
            for name, tensor in self.tensors.items()
            if name not in companions
        }


def find_packed(tensors: Mapping[str, torch.Tensor], label: str, metadata: str | None = None) -> Packing:
    """Find the packed weights of a checkpoint; ``metadata`` is the text of ``_quantization_metadata``.

    Raises:
        BadCheckpoint, Unsupported: as :func:`~xditd.client.packed_weights.find_packing`; the message begins with the
            label.
    """
    for name, tensor in tensors.items():
        if "gg" in type(tensor).__name__.lower():
            raise Unsupported(
                f"{label}: {name} is a GGUF tensor of another loader, which dequantises it in ComfyUI; lend its file "
                "with XDiT UNet Loader"
            )
    try:
        return packing_of_tensors(tensors, metadata)
    except RequestError as error:
        raise named(label, error) from error


def is_mixed(packing: Packing) -> bool:
    """Return whether layers have formats of their own, in which case stock ComfyUI loads a model in another way."""
    return bool(packing.markers) or any(each.companions for each in packing.packed)


def lendable_tensors(
    tensors: Mapping[str, torch.Tensor], packing: Packing, quantises_input: Callable[[PackedWeight], bool]
) -> LendableTensors:
    """Bring a checkpoint into the form in which it is lent; weights are not copied.

    ``quantises_input`` returns whether stock ComfyUI quantises the input of a layer, whatever its file allows.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name not in packing.markers}
    lendable = LendableTensors(kept)
    for packed in packing.packed:
        layer = packed.weight.removesuffix(_WEIGHT)
        names: dict[str, str] = {}
        for role, name in packed.companions.items():
            names[role] = f"{layer}.{role}" if role == "input_scale" else packed.weight + _ENDS[role]
            kept[names[role]] = _companion(packed, role, kept.pop(name))
        described = msgspec.structs.replace(packed, **names, quantises_input=quantises_input(packed))
        lendable.packed[packed.weight] = described
        needs_marker = described.format != "float8" or described.scale is not None or described.quantises_input
        if packed.weight.endswith(_WEIGHT) and needs_marker:
            lendable.markers[layer + MARKER] = _marker(described, kept[packed.weight])
    return lendable


def _companion(packed: PackedWeight, role: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a companion with room for what ComfyUI writes when it packs a patched weight again.

    It computes scales in float32, and for int8 a column of them, one for each row, unless the old one is a scalar.
    Scales in tiles keep their form.
    """
    if role == "scale" and packed.format in SCALED_COLUMNS:
        return tensor
    tensor = tensor.detach().float()
    if role == "scale" and packed.format.startswith("int8") and tensor.ndim:
        tensor = tensor.reshape(-1, 1).expand(packed.rows, 1).contiguous()
    return tensor


def _marker(packed: PackedWeight, weight: torch.Tensor) -> torch.Tensor:
    import torch

    config: dict[str, Any] = {"format": name_in_markers(packed.format, str(weight.dtype).removeprefix("torch."))}
    if packed.format == "int8_convrot":
        config |= {"convrot": True, "convrot_groupsize": packed.group}
    if not packed.quantises_input:
        config["full_precision_matrix_mult"] = True
    return torch.tensor([*json.dumps(config).encode()], dtype=torch.uint8)
