"""Packed weights of modules that run as their class: the layers that multiply them, and what is dequantised once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import torch

from xditd.gpu_workers.models.entries import TORCH_DTYPES, TensorInfo, half_precision
from xditd.gpu_workers.models.pretrained import LoadPlan
from xditd.gpu_workers.packed.dequantise import can_dequantise
from xditd.gpu_workers.packed.linear import is_linear_weight
from xditd.ipc.errors import Unsupported
from xditd.ipc.module_state import ModuleState
from xditd.ipc.name_lists import listed
from xditd.ipc.transports.tensor_views import dtype_name


def as_loaded(tensors: Mapping[str, TensorInfo], compute_dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint with packed weights in the compute dtype.

    That is ``compute_dtype``, else the half precision of most elements of plain tensors, else bfloat16.

    Raises:
        Unsupported: some packed weight has a format that cannot be dequantised.
    """
    packed = {name: info.packed for name, info in tensors.items() if info.packed is not None}
    unknown = [f"{name} is {each.format}" for name, each in packed.items() if not can_dequantise(each.format)]
    if unknown:
        raise Unsupported(f"these formats of packed weights cannot be run: {listed(unknown)}", names=unknown)
    plain = [info for info in tensors.values() if info.packed is None]
    compute = dtype_name(compute_dtype or half_precision(plain) or torch.bfloat16)
    return dict(tensors) | {name: replace(tensors[name], dtype=compute) for name in packed}


def packed_targets(module: torch.nn.Module, plan: LoadPlan, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of weights whose layers multiply them packed; tied weights are dequantised once."""
    uses = Counter(plan.sources.values())
    return [
        name
        for name, source in plan.sources.items()
        if tensors[source].packed is not None
        and len(tensors[source].shape) == 2
        and uses[source] == 1
        and plan.dtypes[name] in TORCH_DTYPES.values()
        and is_linear_weight(module, name)
    ]


def without_weights(state: ModuleState, targets: list[str]) -> ModuleState:
    """Return the description of a module whose packed layers have no parameter ``weight``."""
    submodules = dict(state.submodules)
    for target in targets:
        path = target.removesuffix(".weight")
        left = tuple(name for name in submodules[path].parameters if name != "weight")
        submodules[path] = msgspec.structs.replace(submodules[path], parameters=left)
    return msgspec.structs.replace(state, submodules=submodules)
