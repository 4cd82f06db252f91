"""XDiT Accelerate: turn a stock MODEL into one whose forward runs in the workers, patches included."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import torch

from xditd.client.comfyui.families import adapter_of_model, titles
from xditd.client.comfyui.naming import name_of
from xditd.client.comfyui.packed_tensors import LendableTensors, find_packed, lendable_tensors
from xditd.client.comfyui.patcher import (
    PREFIX,
    WRAPPER_KEY,
    RemotePatcher,
    build_weightless,
    make_transformer_patcher,
    make_weights,
)
from xditd.client.comfyui.stock_dtypes import (
    FLOAT8,
    PLAIN,
    cast_as_stock,
    is_linear,
    keeps_file_dtypes,
    names_in,
    rounding_casts,
)
from xditd.client.comfyui.understood import MODEL_SAMPLING, have_same_steps
from xditd.client.comfyui.unsupported import refuse
from xditd.ipc.errors import Unsupported
from xditd.ipc.packed import PackedWeight
from xditd.ipc.tensors import ComponentKind

_remote_models: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Remote MODELs by the stock model whose tensors they lend, so that queueing a prompt again lends nothing again."""

_PATCHERS = (comfy.model_patcher.ModelPatcher, comfy.model_patcher.ModelPatcherDynamic)
"""Patcher classes of ComfyUI's own loaders. Other classes may load and patch differently, so they are refused."""


def accelerate(patcher: Any) -> RemotePatcher:
    """Return a MODEL with the weights and patches of ``patcher`` whose forward runs in the workers.

    Raises:
        Unsupported: a model family that the workers do not run, an unknown format of weights, or an unknown change of
            the model.
    """
    if isinstance(patcher, RemotePatcher):
        return patcher
    model = patcher.model
    if type(patcher) not in _PATCHERS:
        raise Unsupported(f"XDiT: {name_of(type(patcher))} holds the MODEL; use a stock loader, or XDiT UNet Loader")
    family = adapter_of_model(model)
    if family is None:
        raise Unsupported(f"XDiT: the MODEL is {type(model).__name__}; XDiT runs {titles()}, connect one of these")
    family.check_config(model.model_config, _label(patcher))
    ours = _remote_models.get(model)
    if ours is None:
        lendable = _lendable_of(patcher)
        compute = model.manual_cast_dtype or model.get_dtype()
        weights = make_weights(lendable, ComponentKind.TRANSFORMER, _label(patcher), is_whole=False, dtype=compute)
        shapes = lendable.logical(compute)
        ours = _remote_models[model] = make_transformer_patcher(
            build_weightless(model.model_config, shapes, _operations_of(model)), weights, family
        )
    if next(ours.understood.faults(patcher), None) is not None:
        # Another clone's injections stay in the shared model until ComfyUI unloads it.
        comfy.model_management.unload_model_and_clones(patcher)
        refuse(ours.understood.faults(patcher))
    stock = patcher.clone()
    remote: RemotePatcher = ours.clone()
    for name in ("patches", "patches_uuid", "object_patches", "model_options", "callbacks", "attachments"):
        setattr(remote, name, getattr(stock, name))
    remote.additional_models, remote.hook_patches = stock.additional_models, stock.hook_patches
    remote.weight_wrapper_patches, remote.injections = stock.weight_wrapper_patches, stock.injections
    # A model_sampling that was set in the model itself becomes an object patch.
    sampling = patcher.object_patches_backup.get(MODEL_SAMPLING, model.model_sampling)
    if not _is_same_sampling(sampling, ours.model.model_sampling):
        remote.object_patches.setdefault(MODEL_SAMPLING, sampling)
    own_wrappers = remote.wrappers
    remote.wrappers = stock.wrappers
    for kind, by_key in own_wrappers.items():
        remote.wrappers.setdefault(kind, {})[WRAPPER_KEY] = by_key[WRAPPER_KEY]
    return remote


def _is_same_sampling(sampling: Any, own: Any) -> bool:
    return have_same_steps(sampling, own) and torch.equal(sampling.sigmas.cpu(), own.sigmas.cpu())


def _lendable_of(patcher: Any) -> LendableTensors:
    """Describe the unpatched tensors of a stock MODEL, over the memory that holds them.

    Layers of mixed precision name their tensors as files do. With DynamicVRAM, tensors that ComfyUI casts when it
    loads them are still those of the file: they are cast here.
    """
    module = patcher.model.diffusion_model
    compute = patcher.model.get_dtype_inference()
    known = FLOAT8 if keeps_file_dtypes() else (*FLOAT8, *PLAIN)
    tensors = _base_tensors(patcher)
    packing = find_packed(tensors, _label(patcher))
    described = {name for each in packing.packed if each.companions for name in each.names}
    dtypes = rounding_casts(tensors, names_in(module, known), compute)
    tensors = cast_as_stock(tensors, dtypes, described | packing.markers)
    return lendable_tensors(tensors, find_packed(tensors, _label(patcher)), functools.partial(_quantises_input, module))


def _base_tensors(patcher: Any) -> dict[str, torch.Tensor]:
    """Return the unpatched tensors; ComfyUI keeps them in ``backup`` while patched copies are loaded."""
    tensors: dict[str, torch.Tensor] = patcher.model.diffusion_model.state_dict()
    for key, kept in patcher.backup.items():
        name = key.removeprefix(PREFIX)
        if name in tensors:
            is_packed = isinstance(kept.weight, comfy.quant_ops.QuantizedTensor)
            tensors |= kept.weight.state_dict(name) if is_packed else {name: kept.weight}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _quantises_input(module: Any, packed: PackedWeight) -> bool:
    """Return whether a stock layer quantises its input; it decided that when it was loaded, by its device."""
    layer = module.get_submodule(packed.weight.rpartition(".")[0])
    if packed.format == "float8" and packed.scale is None:
        is_fast = isinstance(layer, comfy.ops.fp8_ops.Linear) and is_linear(packed)
        return is_fast and layer.weight.dtype == torch.float8_e4m3fn
    return packed.quantises_input and not getattr(layer, "_full_precision_mm", False)


def _operations_of(model: Any) -> type:
    """Return the classes of layers of a stock MODEL as ComfyUI's models take them.

    ComfyUI makes those of mixed precision anew for each model; ours is compared with the stock one by class.
    """
    kinds = {type(each) for each in model.diffusion_model.modules() if type(each).__module__ == comfy.ops.__name__}
    return type("StockOperations", (comfy.ops.disable_weight_init,), {kind.__name__: kind for kind in kinds})


def _label(patcher: Any) -> str:
    init = patcher.cached_patcher_init
    path = init[1][0] if init and init[1] and isinstance(init[1][0], str) else type(patcher.model).__name__
    return str(path).rsplit("/", 1)[-1].removesuffix(".safetensors")
