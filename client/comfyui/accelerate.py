"""A MODEL of a known family made remote: a weightless twin that lends what the stock one holds, patches included."""

from __future__ import annotations

import weakref
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from xditd.client.comfyui.families import adapter_of_model, titles
from xditd.client.comfyui.naming import name_of
from xditd.client.comfyui.patcher import (
    PREFIX,
    WRAPPER_KEY,
    RemotePatcher,
    build_weightless,
    lendable,
    make_patcher,
)
from xditd.client.comfyui.understood import MODEL_SAMPLING, steps_alike
from xditd.client.comfyui.unsupported import refuse
from xditd.ipc.errors import Unsupported
from xditd.ipc.tensors import ComponentKind

_twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Weightless models by the stock model whose tensors they lend: queueing again lends nothing."""


_PATCHERS = (comfy.model_patcher.ModelPatcher, comfy.model_patcher.ModelPatcherDynamic)
"""What ComfyUI's own loaders hand out; others may load and patch in ways of their own."""


def accelerate(patcher: Any) -> RemotePatcher:
    """Make a MODEL like ``patcher`` whose forward runs in the workers.

    Raises:
        Unsupported: no family that the workers run, quantised weights, or a change of the model that is not understood.
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
    twin = _twins.get(model)
    if twin is None:
        tensors = _base_tensors(patcher)
        weights = lendable(tensors, ComponentKind.TRANSFORMER, _label(patcher), is_whole=False)
        twin = _twins[model] = make_patcher(build_weightless(model.model_config, tensors), weights, family)
    if next(twin.understood.faults(patcher), None) is not None:
        # What another clone has injected for its own runs is still there until ComfyUI unloads it.
        comfy.model_management.unload_model_and_clones(patcher)
        refuse(twin.understood.faults(patcher))
    stock = patcher.clone()
    remote: RemotePatcher = twin.clone()
    for name in ("patches", "patches_uuid", "object_patches", "model_options", "callbacks", "attachments"):
        setattr(remote, name, getattr(stock, name))
    remote.additional_models, remote.hook_patches = stock.additional_models, stock.hook_patches
    remote.weight_wrapper_patches = stock.weight_wrapper_patches
    # One that was set in the model itself, and not by a patch, goes along as one.
    sampling = patcher.object_patches_backup.get(MODEL_SAMPLING, model.model_sampling)
    if not _is_alike(sampling, twin.model.model_sampling):
        remote.object_patches.setdefault(MODEL_SAMPLING, sampling)
    ours = remote.wrappers
    remote.wrappers = stock.wrappers
    for kind, by_key in ours.items():
        remote.wrappers.setdefault(kind, {})[WRAPPER_KEY] = by_key[WRAPPER_KEY]
    return remote


def _is_alike(sampling: Any, made: Any) -> bool:
    return steps_alike(sampling, made) and torch.equal(sampling.sigmas.cpu(), made.sigmas.cpu())


def _base_tensors(patcher: Any) -> dict[str, torch.Tensor]:
    """The unpatched tensors, also where ComfyUI has patched copies loaded and keeps the originals aside."""
    tensors = patcher.model.diffusion_model.state_dict()
    for key, kept in patcher.backup.items():
        name = key.removeprefix(PREFIX)
        if name in tensors:
            tensors[name] = kept.weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _label(patcher: Any) -> str:
    init = patcher.cached_patcher_init
    path = init[1][0] if init and init[1] and isinstance(init[1][0], str) else type(patcher.model).__name__
    return str(path).rsplit("/", 1)[-1].removesuffix(".safetensors")
