"""Outline a component that will be lent: what workers need to build its model, without a byte of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from xditd.client.lend_checks import (
    check_given,
    check_label,
    check_parts_of_files,
    check_tensors,
    path_of,
    read_tensors,
    reads_config,
)
from xditd.client.lending import checked_compute_dtype, describe_files, with_prefix, without
from xditd.client.lent_memory import LentMemory
from xditd.client.model_folders import find_model, label_of
from xditd.client.model_json import description_of
from xditd.client.module_descriptions import describe_module, is_described
from xditd.client.packed_weights import NO_PACKING, packing_of_tensors
from xditd.ipc.errors import BadRequest
from xditd.ipc.outlines import Outline, OutlinedTensor
from xditd.ipc.tensors import ComponentKind
from xditd.ipc.transports.tensor_views import dtype_name

if TYPE_CHECKING:
    import torch


def outline_of(
    source: Mapping[str, Any] | str | os.PathLike[str] | torch.nn.Module,
    *,
    kind: ComponentKind | None = None,
    label: str | None = None,
    as_class: bool = False,
    variant: str | None = None,
    compute_dtype: str | None = None,
    prefix: str = "",
) -> Outline:
    """Outline what :func:`~xditd.client.lending.describe` describes with the same arguments.

    Of files only the headers are read, of tensors names, dtypes and shapes; they may be on any device, ``meta``
    included. ``source`` may also be a configuration of diffusers or transformers, as their ``config.json`` has it.

    Raises:
        BadCheckpoint, Unsupported, BadRequest: as :func:`~xditd.client.lending.describe`.
    """
    dtype = checked_compute_dtype(compute_dtype)
    check_given(label=label, device=None, generation=0, as_class=as_class, kind=kind)
    check_parts_of_files(source, prefix=prefix, variant=variant)
    if kind in (ComponentKind.LORA, ComponentKind.TOKENIZER):
        raise BadRequest(f"kind {kind.value!r}: no model is built for it, so there is nothing to prepare: lend it")
    if label:  # an empty one is as none
        check_label(label)
    if isinstance(source, (str, bytes, os.PathLike)):
        return _of_path(path_of(source), kind, label, dtype, as_class=as_class, variant=variant, prefix=prefix)
    if isinstance(source, Mapping):
        source = read_tensors(source)
    if isinstance(source, dict) and ("_class_name" in source or "architectures" in source):
        described = description_of(dict(source), "the configuration", allows_family=not as_class)
        return Outline(module=described, label=label or described.class_name, kind=kind, compute_dtype=dtype)
    if as_class or (is_described(source) and reads_config(kind, prefix)):
        label = label or type(source).__name__
        module, tensors = describe_module(cast("torch.nn.Module", source), label, allows_family=not as_class)
        return Outline(module=module, label=label, tensors=_outlined(tensors), compute_dtype=dtype)
    state = cast("Mapping[str, torch.Tensor]", _state_of(source))
    check_tensors(state)
    packing = NO_PACKING if any(each.is_meta for each in state.values()) else packing_of_tensors(state)
    return Outline(
        kind=kind,
        label=label or "state_dict",
        tensors=_outlined(without(state, packing.markers)),
        packed=packing.packed,
        compute_dtype=dtype,
    )


def _of_path(
    path: str,
    kind: ComponentKind | None,
    label: str | None,
    dtype: Any,
    *,
    as_class: bool,
    variant: str | None,
    prefix: str,
) -> Outline:
    label = label or os.fsencode(label_of(path)).decode("utf-8", "replace")
    files = find_model(path, variant=variant, has_class=reads_config(kind, prefix), as_class=as_class, kind=kind)
    memory = LentMemory()
    try:
        specs, packing = describe_files(files, label, None, memory, kind)
        if prefix:
            specs, packing = with_prefix(specs, packing, prefix, label)
    finally:
        memory.close()
    tensors = tuple(OutlinedTensor(spec.name, spec.dtype, spec.shape) for spec in specs)
    return Outline(
        kind=kind, module=files.description, label=label, tensors=tensors, packed=packing.packed, compute_dtype=dtype
    )


def _outlined(tensors: Mapping[str, torch.Tensor]) -> tuple[OutlinedTensor, ...]:
    return tuple(
        OutlinedTensor(name, dtype_name(tensor.dtype, f"tensor {name}"), tuple(tensor.shape))
        for name, tensor in tensors.items()
    )


def _state_of(source: Any) -> dict[str, Any]:
    if not isinstance(source, Mapping) and not hasattr(source, "state_dict"):
        raise BadRequest(
            f"{type(source).__name__} cannot be prepared: give a path, a state dict, a module or a configuration"
        )
    return read_tensors(source)
