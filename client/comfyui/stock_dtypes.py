"""Which dtypes stock ComfyUI chooses for a checkpoint: that in which it holds weights, and that in which it computes.

Source: ComfyUI 0.33, ``comfy/sd.py`` (``load_diffusion_model_state_dict``), ``nodes.py`` (``UNETLoader``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import comfy.model_management as management
import comfy.ops
import comfy.utils
import torch
from comfy.cli_args import PerformanceFeature, args

from xditd.client.comfyui.packed_tensors import LendableTensors, find_packed, is_mixed, lendable_tensors
from xditd.ipc.errors import Unsupported
from xditd.ipc.packed import PackedWeight


@dataclass(frozen=True)
class WeightDtype:
    """A choice of the loader. ``dtype`` of None is stock's; ``is_fast`` multiplies plain fp8 in fp8."""

    dtype: torch.dtype | None = None
    is_fast: bool = False

    @property
    def is_float8(self) -> bool:
        return self.dtype in FLOAT8


FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
PLAIN: Final = (torch.bfloat16, torch.float16, torch.float32)
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
    they are cast as stock does on this device, but for :func:`keeps_file_dtypes`.

    Raises:
        BadCheckpoint, Unsupported: as :func:`~xditd.client.comfyui.packed_tensors.find_packed`; or a dtype in a flag
            of ComfyUI that the workers do not have.
    """
    packing = find_packed(tensors, label, quantization_metadata)
    mixed = is_mixed(packing)
    is_chosen = choice.dtype is not None
    held = None if is_chosen or keeps_file_dtypes() else _held(config, tensors, label, is_mixed=mixed)
    if held in FLOAT8 and not mixed:
        choice = replace(choice, dtype=held)
    if not packing.packed and not choice.is_float8:
        return _hold_plain(config, tensors, choice, held)
    compute = compute_dtype(config, tensors, choice, is_mixed=mixed)
    # Stock casts fp8 without scales to another fp8, but keeps what layers of a mixed checkpoint have.
    keeps_packed = mixed or not choice.is_float8
    described = {name for each in packing.packed for name in each.names} if keeps_packed else set()
    target = choice.dtype if choice.is_float8 else held
    if target is not None:
        shapes = lendable_tensors(tensors, packing, lambda packed: packed.quantises_input).logical(compute)
        dtypes = _parameters(config, shapes, target, compute, is_mixed=mixed)
        if is_chosen:
            dtypes = {name: dtype for name, dtype in dtypes.items() if dtype in FLOAT8}
        dtypes = rounding_casts(tensors, dtypes, compute)
    elif choice.dtype is not None:
        dtypes = dict.fromkeys(tensors, choice.dtype)
    else:
        dtypes = {}
    cast = cast_as_stock(tensors, dtypes, described | packing.markers)
    packing = find_packed(cast, label, quantization_metadata)
    return lendable_tensors(cast, packing, _input_policy(choice, mixed)), compute


def _hold_plain(
    config: Any, tensors: Mapping[str, torch.Tensor], choice: WeightDtype, held: torch.dtype | None
) -> tuple[LendableTensors, torch.dtype]:
    if held is not None and all(each.dtype == held for each in tensors.values()):
        cast = dict(tensors)  # the most frequent case, without the time to build a model
    elif held is not None:
        dtypes = _parameters(config, LendableTensors(dict(tensors)).logical(held), held, held, is_mixed=False)
        cast = cast_as_stock(tensors, rounding_casts(tensors, dtypes, held))
    else:
        cast = {name: each if choice.dtype is None else each.to(choice.dtype) for name, each in tensors.items()}
    dtype: torch.dtype = comfy.utils.weight_dtype(cast)  # of most elements, as in ComfyUI's loader
    return LendableTensors(cast), dtype


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


def keeps_file_dtypes() -> bool:
    """Return whether a loader's default keeps the file's dtypes: where ComfyUI runs on a CPU, without a flag for them.

    There stock computes in float32 whatever the file has; the workers may have GPUs, and get the file itself.
    """
    return management.is_device_cpu(management.get_torch_device()) and not any(getattr(args, each) for each in _FLAGS)


_FLAGS: Final = (
    "fp32_unet", "fp64_unet", "bf16_unet", "fp16_unet", "fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet",
)  # fmt: skip


def _held(config: Any, tensors: Mapping[str, torch.Tensor], label: str, *, is_mixed: bool) -> torch.dtype:
    """Return the dtype in which stock holds a model's parameters by default.

    Raises:
        Unsupported: the workers do not have it.
    """
    held: torch.dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(tensors),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=None if is_mixed else comfy.utils.weight_dtype(tensors),
    )
    if held not in (*FLOAT8, *PLAIN):
        name = str(held).removeprefix("torch.")
        raise Unsupported(f"{label}: ComfyUI's flags ask for weights in {name}; choose a weight_dtype, or drop it")
    return held


def _parameters(
    config: Any, shapes: Mapping[str, torch.Tensor], held: torch.dtype, compute: torch.dtype, *, is_mixed: bool
) -> dict[str, torch.dtype]:
    """Return the dtype to which stock casts each parameter when it loads a checkpoint of these shapes.

    Layers of a mixed checkpoint without a format are held in the compute dtype.
    """
    before = config.custom_operations
    config.custom_operations = comfy.ops.mixed_precision_ops({}, compute) if is_mixed else comfy.ops.manual_cast
    config.set_inference_dtype(held, compute)
    try:
        model = config.get_model(dict(shapes), "", device=torch.device("meta"))
    finally:
        config.custom_operations = before
    found = names_in(model.diffusion_model, (*FLOAT8, *PLAIN))
    return {**dict.fromkeys(shapes, compute), **found} if is_mixed else found  # linear layers have no weight yet


def rounding_casts(
    tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], compute: torch.dtype
) -> dict[str, torch.dtype]:
    """Leave out casts that change no number: from fp8 to a wider dtype, and from the compute dtype to float32.

    Stock holds and multiplies a model's first layer in float32 where its class says so.
    """

    def rounds(name: str, dtype: torch.dtype) -> bool:
        if name not in tensors:
            return False
        before = tensors[name].dtype
        return not ((before in FLOAT8 and dtype in PLAIN) or (before == compute and dtype == torch.float32))

    return {name: dtype for name, dtype in dtypes.items() if rounds(name, dtype)}


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
