"""Describe a component in a manifest: for each tensor the first tier that needs no copy.

| tensors | tier | copied |
|---|---|---|
| on a GPU, in memory that CUDA can export | ``cuda_ipc``, the allocations as they are | nothing |
| on a GPU, in a pool that cannot be exported | ``cuda_ipc``, an arena | once, on that GPU |
| on the CPU, in an :class:`~xditd.client.arenas.Arena` | ``host_shm`` | nothing |
| on the CPU, an unwritten slice of a mapped file | ``file`` | nothing |
| on the CPU, anything else | ``host_shm``, an arena | once, on the host |
| a path, of one or more files | ``file``; with ``device``, ``cuda_ipc`` after one load | nothing; once, to that GPU |
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast, get_args

import msgspec

from xditd.client.file_headers import read_header
from xditd.client.file_loading import load_into_arena
from xditd.client.lend_checks import (
    check_given,
    check_manifest,
    check_parts_of_files,
    check_shards,
    path_of,
    reads_config,
    state_of,
)
from xditd.client.lent_memory import LentMemory
from xditd.client.lent_tensors import describe_tensors
from xditd.client.model_folders import ModelFiles, find_model, label_of
from xditd.client.module_descriptions import describe_module, is_described
from xditd.client.packed_weights import NO_PACKING, Packing, packing_of_files, packing_of_tensors
from xditd.ipc.errors import BadCheckpoint, BadRequest, RequestError, XditdError, named
from xditd.ipc.name_lists import in_log_lines, listed
from xditd.ipc.packed import logical_tensors
from xditd.ipc.recognition import form_error
from xditd.ipc.tensors import (
    Acceleration,
    ComponentKind,
    ComputeDType,
    CopiedBytes,
    Manifest,
    ModuleDescription,
    TensorSpec,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Offer:
    """A component that is ready to be lent: its manifest, and what keeps its memory alive.

    Owns the storages of the lent tensors, the arenas made for them and the open files. Call
    :meth:`close` when the workers have unmapped the component.
    """

    def __init__(
        self,
        manifest: Manifest,
        copied: CopiedBytes,
        timings_ms: dict[str, float],
        memory: LentMemory,
        changed: tuple[str, ...] | None = None,
    ) -> None:
        self.manifest = manifest
        self.copied = copied
        self.changed = changed
        """The tensors that were written since the generation before; ``None``: any may have been."""
        self.timings_ms = timings_ms
        self.tier_notes = tuple(memory.notes)
        self._memory = memory

    def close(self) -> None:
        """Release the lent memory. May be called twice."""
        self._memory.close()


def describe(
    source: Mapping[str, torch.Tensor] | str | os.PathLike[str] | torch.nn.Module,
    *,
    kind: ComponentKind | None = None,
    label: str | None = None,
    device: str | None = None,
    generation: int = 0,
    changed: Collection[str] | None = None,
    as_class: bool = False,
    replaced: Collection[str] = (),
    base_layers: Collection[str] = (),
    variant: str | None = None,
    acceleration: str | None = None,
    compute_dtype: str | None = None,
    prefix: str = "",
) -> Offer:
    """Prepare a component to be lent.

    ``source`` is a state dict, a module (its ``state_dict()``), or the path of a safetensors or a GGUF file, of an
    index of several, or of a folder that diffusers or transformers has saved, of which ``variant`` selects the weights.
    ``device`` (``cuda``, ``cuda:N``) first loads it into an arena there. Without ``kind``, the workers
    determine it from the tensors. Increase ``generation`` after writing to memory that is already lent; ``changed``
    names the tensors that were written since the generation before, if that is known. A module of diffusers or
    transformers is described too, also by its ``config.json``; with ``as_class`` the workers run it as its class does,
    in any case. ``replaced`` are attributes of the module that are left out of the description, and ``base_layers``
    paths of layers of PEFT, in whose place their base layers are lent.
    ``acceleration`` is how forwards of such a module run on GPUs. ``compute_dtype`` is the dtype into which workers
    dequantise packed weights; without it, they take float32 in text encoders of a family, else the half precision of
    most plain weights, or bfloat16.

    Raises:
        BadCheckpoint: a file is not a valid safetensors or GGUF file, the files of a folder or an index are not
            complete, or packed weights do not have the form of their format.
        StaleSource: a file changed while it was read.
        BadRequest: a tensor has no memory that can be shared, ``variant`` is given for what is no folder, ``prefix``
            for what is no file, ``acceleration`` for what does not run as its class, or ``changed`` names no tensor of
            this component.
        Unsupported: ``device`` does not exist, or the checkpoint's form is known to be unsupported.
        UnsupportedDtype: a dtype that cannot be sent to the workers.
        OutOfMemory: too little free memory for an arena.
    """
    memory = LentMemory()
    module: ModuleDescription | None = None
    packing = NO_PACKING
    started = time.perf_counter()
    try:
        check_given(label=label, device=device, generation=generation, as_class=as_class, kind=kind)
        check_parts_of_files(source, prefix=prefix, variant=variant)
        if isinstance(source, (str, bytes, os.PathLike)):
            path = path_of(source)
            label = label or os.fsencode(label_of(path)).decode("utf-8", "replace")  # names need not be Unicode
            files = find_model(
                path, variant=variant, has_class=reads_config(kind, prefix), as_class=as_class, kind=kind
            )
            module = files.description
            specs, packing = describe_files(files, label, device, memory, kind)
            if prefix:
                specs, packing = with_prefix(specs, packing, prefix, label)
        elif as_class or (is_described(source) and reads_config(kind, prefix)):
            label = label or type(source).__name__
            memory.keeps_order = True
            module, tensors = describe_module(
                cast("torch.nn.Module", source),
                label,
                replaced=replaced,
                base_layers=base_layers,
                allows_family=not as_class,
            )
            specs = describe_tensors(state_of(tensors), device, memory)
        else:
            label = label or "state_dict"
            state = state_of(source)
            packing = _named_faults(label, lambda: packing_of_tensors(state))
            specs = describe_tensors(without(state, packing.markers), device, memory)
        manifest = Manifest(
            kind=kind,
            module=module if acceleration is None else _accelerated(module, acceleration, label),
            label=label,
            blocks=tuple(memory.blocks),
            tensors=tuple(specs),
            packed=packing.packed,
            compute_dtype=checked_compute_dtype(compute_dtype),
            generation=generation,
        )
        check_manifest(manifest)
        written = None if changed is None else _written(changed, manifest)
    except BaseException as error:
        if isinstance(error, XditdError):
            for line in in_log_lines(error.names):
                logger.info("not lent, names of the error: %s", line)
        traceback.clear_frames(error.__traceback__)  # frames hold views, and an arena with views cannot be freed
        memory.close()
        raise
    timings_ms = {"describe": (time.perf_counter() - started) * 1e3}
    return Offer(manifest, memory.copied, timings_ms, memory, written)


def _written(changed: Collection[str], manifest: Manifest) -> tuple[str, ...]:
    is_list = isinstance(changed, Collection) and not isinstance(changed, str | bytes) and not hasattr(changed, "dtype")
    if not is_list or not all(isinstance(each, str) for each in changed):
        raise BadRequest(f"{manifest.label}: changed: {changed!r:.100} is not a list of tensors' names")
    unknown = sorted(set(changed) - {spec.name for spec in manifest.tensors})
    if unknown:
        raise BadRequest(f"{manifest.label}: changed names {listed(unknown)}, of which it has no tensor", names=unknown)
    if not manifest.generation:
        raise BadRequest(f"{manifest.label}: changed is of memory that is lent; give the next generation, too")
    return tuple(sorted(changed))


def checked_compute_dtype(given: str | None) -> ComputeDType | None:
    """Check the name of a dtype.

    Raises:
        BadRequest: packed weights cannot be dequantised into it.
    """
    known = get_args(ComputeDType)
    if given is not None and (not isinstance(given, str) or given not in known):
        raise BadRequest(f"compute_dtype: {given!r:.100}; use {', '.join(map(repr, known))}")
    return cast("ComputeDType | None", given)


def _accelerated(module: ModuleDescription | None, acceleration: str, label: str) -> ModuleDescription:
    known = get_args(Acceleration)
    if not isinstance(acceleration, str) or acceleration not in known:
        raise BadRequest(
            f"acceleration: {acceleration!r:.100}; use {', '.join(map(repr, known))}, or None for the daemon's"
        )
    if module is None or module.allows_family:
        raise BadRequest(
            f"{label}: acceleration is of models that run as their class; lend a module or a folder with as_class=True"
        )
    return msgspec.structs.replace(module, acceleration=cast("Acceleration", acceleration))


def describe_files(
    files: ModelFiles, label: str, device: str | None, memory: LentMemory, kind: ComponentKind | None = None
) -> tuple[list[TensorSpec], Packing]:
    """Describe the tensors of files, which ``memory`` holds open, or their copies in an arena on ``device``."""
    opened = [memory.open_file(path) for path in files.paths]
    headers = [read_header(lent) for lent in opened]
    check_shards(files, headers)
    packing = _named_faults(label, lambda: packing_of_files(opened, headers))
    if device is not None:
        if files.description is None or kind is not None:
            stored = {stored.name: stored for header in headers for stored in header.tensors}
            known = form_error(logical_tensors(packing.packed, without(stored, packing.markers)))
            if known is not None:  # before loading: the workers would fail only after it
                raise named(label, known)
        arena = memory.own_arena(load_into_arena(opened, headers, device))
        memory.notes.append(f"loaded once into an arena of {arena.size_bytes} bytes on {device}")
        return describe_tensors(without(arena.tensors, packing.markers), None, memory), packing
    specs = []
    for lent, header in zip(opened, headers, strict=True):
        length = header.length_bytes
        number = memory.block_number(("file", lent.path), lambda lent=lent, length=length: lent.block(length))  # type: ignore[misc]
        specs += [
            TensorSpec(s.name, s.dtype, s.shape, number, s.offset_bytes)
            for s in header.tensors
            if s.name not in packing.markers
        ]
    memory.notes.append(f"file tier: workers map {listed(files.paths)}; nothing is read into this process")
    return specs, packing


def with_prefix(
    specs: Sequence[TensorSpec], packing: Packing, prefix: str, label: str
) -> tuple[list[TensorSpec], Packing]:
    """Select the tensors whose names begin with ``prefix``, and the packed weights among them.

    Raises:
        BadCheckpoint: there are none.
    """
    found = [spec for spec in specs if spec.name.startswith(prefix)]
    if not found:
        raise BadCheckpoint(f"{label}: no tensor of it begins with {prefix!r}")
    packed = tuple(each for each in packing.packed if each.weight.startswith(prefix))
    return found, dataclasses.replace(packing, packed=packed)


def without(tensors: Mapping[str, T], names: Collection[str]) -> Mapping[str, T]:
    """Return the tensors that are not among ``names``."""
    return {name: each for name, each in tensors.items() if name not in names} if names else tensors


def _named_faults(label: str, find: Callable[[], Packing]) -> Packing:
    """Find packed weights; an error begins with the label."""
    try:
        return find()
    except RequestError as error:
        raise named(label, error) from error
