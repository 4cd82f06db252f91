"""Any FLUX.1 MODEL made remote: a weightless twin that lends what the stock one holds, patches included."""

from __future__ import annotations

import weakref
from typing import Any

import comfy.model_base
import torch

from xditd.client.comfyui.patcher import (
    PREFIX,
    WRAPPER_KEY,
    RemotePatcher,
    build_weightless,
    lendable,
    make_patcher,
)
from xditd.ipc.errors import Unsupported
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import ComponentKind

_twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Weightless models by the stock model whose tensors they lend: queueing again lends nothing."""


def accelerate(patcher: Any) -> RemotePatcher:
    """Make a MODEL like ``patcher`` whose forward runs in the workers.

    Raises:
        Unsupported: not FLUX.1, quantised weights, or Python code injected into the model.
    """
    if isinstance(patcher, RemotePatcher):
        return patcher
    model = patcher.model
    if not isinstance(model, comfy.model_base.Flux):
        raise Unsupported(f"XDiT: the MODEL is {type(model).__name__}; FLUX.1 is supported, connect one of that family")
    if patcher.injections:
        raise Unsupported(f"XDiT: {listed(patcher.injections)} injects Python code into the MODEL")
    twin = _twins.get(model)
    if twin is None:
        tensors = _base_tensors(patcher)
        weights = lendable(tensors, ComponentKind.TRANSFORMER, _label(patcher), is_whole=False)
        twin = _twins[model] = make_patcher(build_weightless(model.model_config, tensors), weights)
    stock = patcher.clone()
    remote: RemotePatcher = twin.clone()
    for name in ("patches", "patches_uuid", "object_patches", "model_options", "callbacks", "attachments"):
        setattr(remote, name, getattr(stock, name))
    remote.additional_models, remote.hook_patches = stock.additional_models, stock.hook_patches
    remote.weight_wrapper_patches = stock.weight_wrapper_patches
    ours = remote.wrappers
    remote.wrappers = stock.wrappers
    for kind, by_key in ours.items():
        remote.wrappers.setdefault(kind, {})[WRAPPER_KEY] = by_key[WRAPPER_KEY]
    return remote


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
