"""Which dtypes stock ComfyUI chooses for a checkpoint: that in which it holds weights, and that in which it computes.

Source: ComfyUI 0.33, ``comfy/sd.py`` (``load_diffusion_model_state_dict``), ``nodes.py`` (``UNETLoader``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import comfy.model_management as management
import comfy.ops
import comfy.utils
import torch
from comfy.cli_args import PerformanceFeature, args

from xditd.client.comfyui.packed_tensors import LendableTensors, find_packed, is_mixed, lendable_tensors
from xditd.ipc.packed import PackedWeight


@dataclass(frozen=True)
class WeightDtype:
    """A choice of the loader. ``dtype`` of None keeps the file's; ``is_fast`` multiplies plain fp8 in fp8."""

    dtype: torch.dtype | None = None
    is_fast: bool = False

    @property
    def is_float8(self) -> bool:
        return self.dtype in FLOAT8


FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
CHOICES: Final[Mapping[str, WeightDtype]] = {
    "default": WeightDtype(),
    "fp8_e4m3fn": WeightDtype(torch.float8_e4m3fn),
    "fp8_e4m3fn_fast": WeightDtype(torch.float8_e4m3fn, is_fast=True),
    "fp8_e5m2": WeightDtype(torch.float8_e5m2),
    "bfloat16": WeightDtype(torch.bfloat16),
    "float16": WeightDtype(torch.float16),
    "float32": WeightDtype(torch.float32),
}
"""The choices of ComfyUI's own loader, and three that it does not have."""


def hold_as_stock(
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    label: str,
    choice: WeightDtype,
    quantization_metadata: str | None = None,
) -> tuple[LendableTensors, torch.dtype]:
    """Describe the tensors of a checkpoint as stock would hold them, and return the dtype of the model's inputs.

    ``tensors`` have ComfyUI's names. Packed weights of the file stay as they are. With a choice of fp8, other tensors
    are cast to it where stock does that, which is a copy; with another choice plain tensors are cast. Without a choice
    plain tensors keep the file's dtype.

    Raises:
        BadCheckpoint, Unsupported: as :func:`~xditd.client.comfyui.packed_tensors.find_packed`.
    """
    packing = find_packed(tensors, label, quantization_metadata)
    mixed = is_mixed(packing)
    if not packing.packed and not choice.is_float8:
        cast = {name: each if choice.dtype is None else each.to(choice.dtype) for name, each in tensors.items()}
        dtype: torch.dtype = comfy.utils.weight_dtype(cast)  # of most elements, as in ComfyUI's loader
        return LendableTensors(cast), dtype
    compute = compute_dtype(config, tensors, choice, is_mixed=mixed)
    # Stock casts fp8 without scales to another fp8, but keeps what layers of a mixed checkpoint have.
    keeps_packed = mixed or not choice.is_float8
    described = {name for each in packing.packed for name in each.names} if keeps_packed else set()
    if choice.is_float8:
        shapes = lendable_tensors(tensors, packing, lambda packed: packed.quantises_input).logical(compute)
        dtypes = _float8_parameters(config, shapes, choice, compute, mixed)
    elif choice.dtype is not None:
        dtypes = dict.fromkeys(tensors, choice.dtype)
    else:
        dtypes = {}
    cast = cast_as_stock(tensors, dtypes, described | packing.markers)
    packing = find_packed(cast, label, quantization_metadata)
    return lendable_tensors(cast, packing, _input_policy(choice, mixed)), compute


def compute_dtype(
    config: Any, tensors: Mapping[str, torch.Tensor], choice: WeightDtype, *, is_mixed: bool
) -> torch.dtype:
    """Return the dtype in which stock computes on ComfyUI's device; ``is_mixed``: layers have formats of their own."""
    if choice.dtype is not None and not choice.is_float8:
        return choice.dtype
    supported = list(config.supported_inference_dtypes)
    held = choice.dtype
    if held is None:
        held = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(tensors),
            supported_dtypes=supported,
            weight_dtype=None if is_mixed else comfy.utils.weight_dtype(tensors),
        )
    cast = management.unet_manual_cast(None if is_mixed else held, management.get_torch_device(), supported)
    found: torch.dtype = held if cast is None else cast
    return found


def _input_policy(choice: WeightDtype, is_mixed: bool) -> Callable[[PackedWeight], bool]:
    """Return a function that says whether stock quantises the input of a layer on ComfyUI's device."""
    has_float8 = management.supports_fp8_compute(management.get_torch_device())
    is_fast = has_float8 and not is_mixed
    is_fast = is_fast and (choice.is_fast or PerformanceFeature.Fp8MatrixMultiplication in args.fast)

    def quantises(packed: PackedWeight) -> bool:
        if packed.format != "float8":
            return packed.quantises_input
        if packed.scale is None:
            return is_fast and is_linear(packed)
        return packed.quantises_input and has_float8

    return quantises


def _float8_parameters(
    config: Any, shapes: Mapping[str, torch.Tensor], choice: WeightDtype, compute: torch.dtype, is_mixed: bool
) -> dict[str, torch.dtype]:
    """Return the parameters that stock casts to fp8 when it loads a checkpoint of these shapes.

    Layers of a mixed checkpoint are not among them: those without a format are held in the compute dtype.
    """
    before = config.custom_operations
    config.custom_operations = comfy.ops.mixed_precision_ops({}, compute) if is_mixed else comfy.ops.manual_cast
    config.set_inference_dtype(choice.dtype, compute)
    try:
        model = config.get_model(dict(shapes), "", device=torch.device("meta"))
    finally:
        config.custom_operations = before
    return names_in(model.diffusion_model, FLOAT8)


def is_linear(packed: PackedWeight) -> bool:
    return packed.weight.endswith(".weight") and len(packed.shape) == 2


def names_in(model: Any, dtypes: Collection[torch.dtype]) -> dict[str, torch.dtype]:
    """Return the parameters that a model of ComfyUI holds in one of these dtypes once it is loaded, by name.

    With DynamicVRAM, parameters keep the file's dtype until they are loaded, or there are none yet.
    """
    found: dict[str, torch.dtype] = {}
    for path, module in model.named_modules():
        for name in {name for name, _ in module.named_parameters(recurse=False)} | {"weight", "bias"}:
            dtype = getattr(module, f"{name}_comfy_model_dtype", None)
            if dtype is None:
                dtype = getattr(getattr(module, name, None), "dtype", None)
            if isinstance(dtype, torch.dtype) and dtype in dtypes:
                found[f"{path}.{name}" if path else name] = dtype
    return found


def cast_as_stock(
    tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], packed: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Cast plain tensors to the dtypes in which stock holds them; those of other names, or packed, stay as they are."""
    found = dict(tensors)
    for name, dtype in dtypes.items():
        if name in found and name not in packed and found[name].is_floating_point():
            found[name] = found[name].to(dtype)
    return found
