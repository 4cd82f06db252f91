"""Check the arguments of ``lend`` before any memory is shared."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.client.model_folders import ModelFiles
from xditd.ipc import limits
from xditd.ipc.addresses import check_is_there, expand_home
from xditd.ipc.errors import BadCheckpoint, BadRequest
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import ComponentKind, Manifest
from xditd.ipc.transports.stored_tensors import Header

if TYPE_CHECKING:
    import torch


def check_given(*, label: Any, device: Any, generation: Any, as_class: Any, kind: ComponentKind | None = None) -> None:
    """Check the arguments of ``lend`` and ``lend_lora`` that say how to lend.

    Raises:
        BadRequest: one is of another type, or out of range; it is named, with its value.
    """
    for name, value, what in (("label", label, "a text"), ("device", device, "a text, such as 'cuda:1'")):
        if value is not None and not isinstance(value, str):
            raise BadRequest(f"{name}: {value!r:.100} is of type {type(value).__name__}, use {what}")
    if isinstance(generation, bool) or not isinstance(generation, int) or not 0 <= generation < 2**63:
        raise BadRequest(f"generation: {generation!r:.100} is not a whole number from 0 on, below 2**63")
    if not isinstance(as_class, bool):
        raise BadRequest(f"as_class: {as_class!r:.100} is of type {type(as_class).__name__}, use True or False")
    check_kind(kind, as_class=as_class)


def check_kind(kind: ComponentKind | None, *, as_class: bool) -> None:
    """Check that a component is not lent both as one of a family and as its class.

    Raises:
        BadRequest: it is.
    """
    if as_class and kind is not None:
        raise BadRequest(
            f"kind {kind.value!r} is of a component that a family runs, and as_class says that none does: leave one of "
            "them out"
        )


def reads_config(kind: ComponentKind | None, prefix: str) -> bool:
    """Return whether a component is lent with its configuration, if it has one.

    A part of a file with several has none, and neither has what is no model of a family.
    """
    return kind is None or (kind is not ComponentKind.MODULE and not prefix)


def path_of(source: str | bytes | os.PathLike[Any]) -> str:
    """Return the path of a file or a folder as text; a tilde is the home folder.

    Raises:
        BadRequest: there is no such file or folder, or it is a text that no file can be named.
    """
    path = expand_home(os.fsdecode(source))
    check_is_there(path)
    return path


def state_of(source: Any) -> Mapping[str, torch.Tensor]:
    """Get the tensors of a state dict or a module, each checked.

    Raises:
        BadRequest: neither of the two, or an entry that is not a tensor with its own memory.
    """
    if not isinstance(source, Mapping) and not hasattr(source, "state_dict"):
        raise BadRequest(
            f"{type(source).__name__} cannot be lent: give a state dict, a module or a path; of a pipeline "
            "one model at a time, such as pipe.transformer, or run all of it by accelerate(pipe)"
        )
    tensors = read_tensors(source)
    check_tensors(tensors)
    for name, tensor in tensors.items():
        _check_memory(name, tensor)
    return tensors


def check_tensors(tensors: Mapping[Any, Any]) -> None:
    """Check the tensors of a component and their names, but not where their memory is.

    Raises:
        BadRequest: there are none or too many, or one of them, or its name, cannot be sent to the workers.
    """
    if not tensors:
        raise BadRequest("component without tensors: nothing to lend")
    if len(tensors) > limits.MAX_TENSORS:
        raise BadRequest(f"component of {len(tensors)} tensors: at most {limits.MAX_TENSORS} can be lent")
    for name, tensor in tensors.items():
        _check_name(name)
        _check_tensor(name, tensor)


_FAILED_READS: Final = (OSError, EOFError, LookupError, AttributeError, RuntimeError, TypeError, ValueError)
"""What a mapping of a program, or the ``state_dict`` of a module, raises if it cannot give its tensors."""


def read_tensors(source: Any) -> dict[str, Any]:
    """Read the entries of a state dict or of a module's, each once: a mapping may read them from a file.

    Raises:
        BadRequest: the source cannot give them; names it and its entry.
    """
    what, name = type(source).__name__, None
    try:
        state = source if isinstance(source, Mapping) else source.state_dict()
        if type(state) in (dict, OrderedDict):
            return dict(state)
        found = {}
        for name in state:
            found[name] = state[name]
    except _FAILED_READS as error:
        entry = "its names" if name is None else f"tensor {name}"
        raise BadRequest(
            f"source of type {what}: {entry} cannot be read: {type(error).__name__}: {error}; give a dict of tensors "
            "that are in memory, or the path of their file"
        ) from error
    return found


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that the daemon could not decode.

    Raises:
        BadRequest: no tensors, more blocks than a message may hold, or an invalid label.
    """
    if not manifest.tensors:
        raise BadRequest(f"component {manifest.label!r} without tensors: nothing to lend")
    if len(manifest.blocks) > limits.MAX_BLOCKS:
        raise BadRequest(
            f"component {manifest.label!r} is in {len(manifest.blocks)} allocations: at most {limits.MAX_BLOCKS} "
            "can be lent; copy it into an Arena first"
        )
    check_label(manifest.label)


def check_label(label: str) -> None:
    """Refuse a label that the daemon could not decode.

    Raises:
        BadRequest: it is empty, too long, or no Unicode text.
    """
    if not _is_name(label):
        raise BadRequest(f"label {label!r:.200}: 1 to {limits.MAX_NAME_CHARS} Unicode characters are needed")


def check_parts_of_files(source: object, *, prefix: Any, variant: Any) -> None:
    """Check the arguments that select files of a folder, or tensors of a file.

    Raises:
        BadRequest: one is of another type, or the source is no path.
    """
    if not isinstance(prefix, str):
        raise BadRequest(f"prefix: {prefix!r:.100} is of type {type(prefix).__name__}, use a text")
    if isinstance(source, (str, bytes, os.PathLike)):
        return
    if prefix:
        raise BadRequest(f"prefix {prefix!r} selects the tensors of a file: give its path")
    if variant is not None:
        raise BadRequest(f"variant {variant!r} selects one of the files of a folder: give the folder's path")


def check_shards(files: ModelFiles, headers: Sequence[Header]) -> None:
    """Check that the files of a model have the tensors of its index, each once.

    Raises:
        BadCheckpoint: a shard lacks a tensor that the index says it has, or two shards have the same tensor.
    """
    shard_of: dict[str, str] = {}
    for path, header in zip(files.paths, headers, strict=True):
        shard = Path(path).name
        for stored in header.tensors:
            other = shard_of.setdefault(stored.name, shard)
            if other != shard:
                raise BadCheckpoint(
                    f"{files.index}: tensor {stored.name} is in two shards, {other} and {shard}: download them again"
                )
    if len(shard_of) > limits.MAX_TENSORS:
        raise BadCheckpoint(
            f"{files.index}: shards of {len(shard_of)} tensors; at most {limits.MAX_TENSORS} can be lent"
        )
    absent = [f"{name} of {shard}" for name, shard in (files.weight_map or {}).items() if shard_of.get(name) != shard]
    if absent:
        raise BadCheckpoint(
            f"{files.index}: its shards lack {len(absent)} tensors that it lists: {listed(absent)}; "
            "download the index and its shards again, of one revision",
            names=absent,
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _is_name(name):
        raise BadRequest(
            f"tensor name {name!r:.200}: 1 to {limits.MAX_NAME_CHARS} Unicode characters are needed as a name"
        )


def _is_name(text: str) -> bool:
    return 1 <= len(text) <= limits.MAX_NAME_CHARS and (text.isascii() or not _has_surrogates(text))


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_tensor(name: str, tensor: object) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise BadRequest(f"{name} is a {type(tensor).__name__}, not a tensor: leave it out of what is lent")
    if tensor.is_nested:
        raise BadRequest(f"tensor {name} is nested: lend each of its tensors, or its to_padded_tensor(0.0)")
    if tensor.layout is not torch.strided:
        raise BadRequest(f"tensor {name} has the layout {tensor.layout}: lend its to_dense()")
    if tensor.ndim > limits.MAX_RANK:
        raise BadRequest(f"tensor {name} has {tensor.ndim} dimensions: at most {limits.MAX_RANK} can be lent")


def _check_memory(name: str, tensor: torch.Tensor) -> None:
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # tensor subclasses raise it if they have no accessible memory
        address = 0
    if tensor.numel() and not address:
        raise BadRequest(
            f"tensor {name} ({type(tensor).__name__} on {tensor.device}) has no memory of its own: "
            "materialise or dequantise it first"
        )
