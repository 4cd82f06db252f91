"""Prepare a LoRA to be lent: its factors as other components, in the first tier that needs no copy."""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from xditd.client.file_headers import read_header
from xditd.client.file_loading import load_into_arena
from xditd.client.lend_checks import check_given, check_manifest, path_of, state_of
from xditd.client.lending import Offer
from xditd.client.lent_memory import LentMemory
from xditd.client.lent_tensors import describe_tensors
from xditd.client.loras.layers import LoraLayers, Matrix, group_layers
from xditd.client.loras.scales import PeftConfig, decode_scalar, parse_config, read_configs, split_configs
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported
from xditd.ipc.loras import LoraDescription, LoraLayer, LoraPart, lora_faults
from xditd.ipc.name_lists import SENTENCE_CHARS, listed
from xditd.ipc.tensors import ComponentKind, Manifest, TensorSpec
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.stored_tensors import StoredTensor
from xditd.ipc.transports.tensor_views import dtype_name

if TYPE_CHECKING:
    import torch

CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_MAX_CONFIG_BYTES: Final = 2**20


@dataclass(frozen=True)
class ReadLora:
    """A LoRA that another program has read: its layers, and their factors by the names in these."""

    layers: Sequence[LoraLayer]
    factors: Mapping[str, torch.Tensor]


def describe_lora(
    source: Mapping[str, torch.Tensor] | str | os.PathLike[str] | ReadLora,
    *,
    label: str | None = None,
    device: str | None = None,
    metadata: Mapping[str, str] | None = None,
    generation: int = 0,
    as_class: bool = False,
) -> Offer:
    """Prepare a LoRA to be lent: a state dict with its ``metadata``, a safetensors file, a folder that PEFT wrote, or
    what another program has read.

    With ``as_class`` its names are those of layers of a module that runs as its class.

    Raises:
        Unsupported: another adapter than LoRA, no adapter, or factors that are packed or in another dtype.
        BadCheckpoint: the file is invalid, or the LoRA not whole; every fault is named.
        BadRequest: a tensor has no memory that can be shared, or ``metadata`` is given with a file, which has its own.
        StaleSource, OutOfMemory: see :func:`xditd.client.lending.describe`.
    """
    memory = LentMemory()
    started = time.perf_counter()
    try:
        check_given(label=label, device=device, generation=generation, as_class=as_class)
        if metadata is not None and not isinstance(metadata, Mapping):
            raise BadRequest(f"metadata: {metadata!r:.100} is of type {type(metadata).__name__}, use a dict of texts")
        if isinstance(source, (str, bytes, os.PathLike)):
            if metadata is not None:
                raise BadRequest("metadata: a file has its own; give it with a state dict")
            path, config = _find(path_of(source))
            label = label or os.fsencode(Path(path).stem).decode("utf-8", "replace")
            layers, specs = _describe_file(path, config, label, device, memory)
        elif isinstance(source, ReadLora):
            if metadata is not None:
                raise BadRequest("metadata: the layers have their scales; give it with a state dict")
            label = label or "lora"
            layers, specs = _describe_read(source, label, device, memory)
        else:
            label = label or "lora"
            layers, specs = _describe_state(state_of(source), metadata or {}, label, device, memory)
        manifest = Manifest(
            kind=ComponentKind.LORA,
            label=label,
            blocks=tuple(memory.blocks),
            tensors=tuple(specs),
            lora=replace(layers.description, as_class=as_class, keeps_dtypes=as_class and isinstance(source, ReadLora)),
            generation=generation,
        )
        check_manifest(manifest)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # frames hold views, and an arena with views cannot be freed
        memory.close()
        raise
    return Offer(manifest, memory.copied, {"describe": (time.perf_counter() - started) * 1e3}, memory)


def _find(path: str) -> tuple[str, str | None]:
    """Return the file of a LoRA, and that of its configuration, if it is beside it."""
    folder = Path(path)
    if not os.path.isdir(path):
        beside = folder.parent / CONFIG
        is_of_peft = folder.name == _WEIGHTS[0] and os.path.isfile(beside)
        return path, str(beside) if is_of_peft else None
    for name in _WEIGHTS:
        if os.path.isfile(folder / name):
            return _find(str(folder / name))
    raise BadCheckpoint(f"{path}: a folder without {' or '.join(_WEIGHTS)}: give the path of the LoRA's file")


def _describe_file(
    path: str, config: str | None, label: str, device: str | None, memory: LentMemory
) -> tuple[LoraLayers, list[TensorSpec]]:
    lent = memory.open_file(path)
    header = read_header(lent)
    if header.packed:
        raise Unsupported(f"{path}: a GGUF file of packed tensors is no LoRA: lend its safetensors file")
    stored = {each.name: each for each in header.tensors}
    configs = read_configs(header.metadata, label) if config is None else _read_config(config)
    layers = group_layers(stored, label, lambda name: _read_alpha(lent, stored[name]), configs)
    if device is not None:
        arena = memory.own_arena(load_into_arena([lent], [header], device))
        memory.notes.append(f"loaded once into an arena of {arena.size_bytes} bytes on {device}")
        return layers, describe_tensors(_as_matrices(arena.tensors, layers.factors), None, memory)
    number = memory.block_number(("file", lent.path), lambda: lent.block(header.length_bytes))
    memory.notes.append(f"file tier: workers map {path}; nothing is read into this process")
    return layers, [
        TensorSpec(name, stored[name].dtype, matrix.shape, number, stored[name].offset_bytes)
        for name, matrix in layers.factors.items()
    ]


def _describe_state(
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    label: str,
    device: str | None,
    memory: LentMemory,
) -> tuple[LoraLayers, list[TensorSpec]]:
    infos = {name: Matrix(dtype_name(each.dtype, f"tensor {name}"), tuple(each.shape)) for name, each in state.items()}

    def alpha_of(name: str) -> float:
        if state[name].numel() != 1:
            raise BadCheckpoint(f"{label}: tensor {name} {list(state[name].shape)} is no alpha, which is one number")
        try:
            return float(state[name].item())
        except TypeError:
            dtype = infos[name].dtype
            raise BadCheckpoint(f"{label}: tensor {name} is {dtype}, which is no alpha: use a real number") from None

    layers = group_layers(infos, label, alpha_of, read_configs(metadata, label))
    return layers, describe_tensors(_as_matrices(state, layers.factors), device, memory)


def _describe_read(
    read: ReadLora, label: str, device: str | None, memory: LentMemory
) -> tuple[LoraLayers, list[TensorSpec]]:
    factors = {
        name: Matrix(dtype_name(each.dtype, f"tensor {name}"), tuple(each.shape)) for name, each in read.factors.items()
    }
    faults = lora_faults(read.layers, factors)
    if faults:
        raise BadCheckpoint(f"{label}: not a LoRA: {listed(faults, joint='; ', chars=SENTENCE_CHARS)}", names=faults)
    layers = LoraLayers(LoraDescription(layers=tuple(read.layers)), factors)
    return layers, describe_tensors(read.factors, device, memory)


def _as_matrices(tensors: Mapping[str, torch.Tensor], factors: Mapping[str, Matrix]) -> dict[str, torch.Tensor]:
    return {name: tensors[name].view(tensors[name].shape[:2]) for name in factors}


def _read_alpha(lent: LentFile, stored: StoredTensor) -> float:
    if math.prod(stored.shape) != 1:
        raise BadCheckpoint(f"{lent.path}: tensor {stored.name} {list(stored.shape)} is no alpha, which is one number")
    content = lent.read(stored.size_bytes, stored.offset_bytes)
    return decode_scalar(content, stored.dtype, f"{lent.path}: {stored.name}")


def _read_config(path: str) -> dict[LoraPart, PeftConfig]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: cannot be read: {error}") from error
    return split_configs(parse_config(text, path), path)
