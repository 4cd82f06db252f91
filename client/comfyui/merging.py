"""Merge patches (LoRAs) into weights with ComfyUI's own algorithm, precision and rounding.

A patched weight keeps its format, as in ComfyUI: a packed one is dequantised, patched, and packed again with new
scales and with stochastic rounding, whose seed is the name of the weight.

Sources: ComfyUI 0.33, ``comfy/model_patcher.py`` (``patch_weight_to_device``), ``comfy/ops.py`` (``set_weight``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.quant_ops
import comfy.utils
import torch

from xditd.client.comfyui.weights import Edit
from xditd.client.packed_markers import name_in_markers
from xditd.ipc.errors import Unsupported
from xditd.ipc.packed import PackedWeight
from xditd.ipc.tensors import ComputeDType
from xditd.ipc.transports.tensor_views import torch_dtype


class _ById:
    """Wrap a value so that it is compared by identity."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def edit_of(
    patches: Sequence[Any], key: str, device: torch.device, packed: PackedWeight | None, dtype: ComputeDType | None
) -> Edit:
    """Return the edit that merges ``patches`` into the weight ``key``, which is ``packed`` or plain.

    ``dtype`` is the compute dtype of packed weights.
    """
    # LoRA adapters are compared by identity; the recipe keeps them alive, so that no id is used twice.
    recipe = tuple(
        (strength, _ById(value), model, offset, _ById(how)) for strength, value, model, offset, how in patches
    )
    if packed is None or dtype is None or packed.scale is None:
        return Edit(recipe, functools.partial(_merge, patches, key, device))
    return Edit(recipe, functools.partial(_merge_packed, patches, key, device, packed, dtype))


def quantised_tensor(packed: PackedWeight, tensors: Sequence[torch.Tensor], dtype: ComputeDType) -> Any:
    """Return ComfyUI's tensor of a packed weight, over the same memory; ``tensors`` are those of ``packed.names``.

    Raises:
        Unsupported: fp8 with a scale for each row, which ComfyUI does not have.
    """
    given = dict(zip(("weight", *packed.companions), tensors, strict=True))
    weight = given["weight"]
    if packed.format == "float8" and given["scale"].numel() > 1:
        raise Unsupported(
            f"XDiT: {packed.weight} is fp8 with a scale for each row, which ComfyUI cannot patch; "
            "remove the LoRA or merging node, or load a file with one scale for each weight"
        )
    name = name_in_markers(packed.format, str(weight.dtype).removeprefix("torch."))
    layout = comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
    params: dict[str, Any] = {"scale": given["scale"], "orig_dtype": torch_dtype(dtype), "orig_shape": packed.shape}
    if packed.format == "nvfp4":
        params |= {"scale": given["scale_2"], "block_scale": given["scale"].view(torch.float8_e4m3fn)}
    elif packed.format == "mxfp8":
        params["scale"] = given["scale"].view(torch.float8_e8m0fnu)
    elif packed.format == "int8_convrot":
        params |= {"convrot": True, "convrot_groupsize": packed.group}
    made = comfy.quant_ops.get_layout_class(layout).Params(**params)
    return comfy.quant_ops.QuantizedTensor(weight, layout, made)


def _merge(patches: Sequence[Any], key: str, device: torch.device, base: torch.Tensor) -> torch.Tensor:
    """Compute a patched weight; ComfyUI rounds it to the dtype in which it holds the model."""
    wide = comfy.model_management.lora_compute_dtype(device)
    value = comfy.model_management.cast_to_device(base, device, wide, copy=True)
    value = _patched(patches, key, value, base.shape)
    rounded: torch.Tensor = comfy.float.stochastic_rounding(value, base.dtype, seed=comfy.utils.string_to_seed(key))
    return rounded


def _merge_packed(
    patches: Sequence[Any],
    key: str,
    device: torch.device,
    packed: PackedWeight,
    dtype: ComputeDType,
    *tensors: torch.Tensor,
) -> list[torch.Tensor]:
    """Compute a patched weight in the format of the unpatched one, and its companions."""
    base = quantised_tensor(packed, tensors, dtype)
    wide = comfy.model_management.lora_compute_dtype(device)
    value = comfy.model_management.cast_to_device(base, device, wide, copy=True).dequantize()
    value = _patched(patches, key, value, base.shape)
    made = base.requantize_from_float(
        value, scale="recalculate", stochastic_rounding=comfy.utils.string_to_seed(key), inplace_ops=True
    ).state_dict("weight")
    found = {"weight": made["weight"], "scale": made["weight_scale"], "scale_2": made.get("weight_scale_2")}
    result = []
    for role, before in zip(("weight", *packed.companions), tensors, strict=True):
        after = found.get(role)
        result.append(before if after is None else _formed(after, before))
    return result


def _formed(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return a tensor that can be copied into ``before``: bytes stay bytes, a scalar becomes one for each row."""
    if after.dtype != before.dtype and after.dtype.itemsize == before.dtype.itemsize == 1:
        after = after.view(before.dtype)
    return after.reshape(before.shape) if after.numel() == before.numel() else after.expand(before.shape)


def _patched(patches: Sequence[Any], key: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    found: torch.Tensor = comfy.lora.calculate_weight(patches, value, key)
    if found.shape != shape:
        raise Unsupported(
            f"XDiT: a patch changes the shape of {key} from {list(shape)} to {list(found.shape)}; control LoRAs "
            "are not supported"
        )
    return found
