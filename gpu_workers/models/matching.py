"""Match a manifest to what runs it: a family that knows its tensors, or the class that it describes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec
import torch

from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.class_defaults import settings_of
from xditd.gpu_workers.models.class_models import ClassModels
from xditd.gpu_workers.models.configured_classes import build_module
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.lora_match import LoraMatch, match_lora
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.module_match import ModuleMatch
from xditd.gpu_workers.models.registry import describe, families, load_faults_note
from xditd.gpu_workers.models.tokenizer_match import TokenizerMatch
from xditd.ipc.errors import BadCheckpoint, BadRequest, RequestError, UnknownFamily, Unsupported, named
from xditd.ipc.name_lists import SENTENCE_CHARS, listed
from xditd.ipc.outlines import Outline, OutlinedTensor
from xditd.ipc.recognition import one_of
from xditd.ipc.tensors import ComponentKind, Manifest, ModuleDescription
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype

logger = logging.getLogger(__name__)

LoadedMatch = CheckpointMatch | ModuleMatch | LoraMatch
AnyMatch = LoadedMatch | TokenizerMatch


def match_manifest(
    manifest: Manifest | Outline, models: ModelCache, class_models: ClassModels, taken: Collection[int] = ()
) -> LoadedMatch:
    """Match a manifest to a model of a family, or to a module that runs as its class, or as a LoRA.

    ``taken`` as :meth:`ModelCache.match` takes them.

    Raises:
        UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported: the tensors do not fit.
        BadRequest: a module without its description, or a description that cannot be read.
    """
    try:
        if isinstance(manifest, Manifest) and manifest.lora is not None:
            return match_lora(manifest, manifest.lora)
        tensors = _logical_infos(manifest)
        compute_dtype = None if manifest.compute_dtype is None else torch_dtype(manifest.compute_dtype)
        if manifest.module is not None:
            if manifest.packed and manifest.module.state:
                raise Unsupported(
                    "packed weights of a module cannot be run: lend its file, its folder or its state dict"
                )
            return _match_class(manifest.module, tensors, models, class_models, compute_dtype)
        if manifest.kind is ComponentKind.MODULE:
            raise BadRequest("a module is lent without the description of its class; lend the module itself")
        if manifest.kind is None:
            described = describe({name: info.shape for name, info in tensors.items()})
            if described is not None:
                found = class_models.match(described, tensors, compute_dtype)
                return replace(found, family_reason=f"a file of a {found.model.class_name} always runs as its class")
        return models.match(tensors, None if manifest.kind is None else manifest.kind.value, compute_dtype, taken)
    except RequestError as error:
        raise named(manifest.label, error) from error


def outline_of_class(outline: Outline) -> Outline:
    """Return an outline with the tensors that its module's class makes, as a checkpoint in one dtype has them.

    Raises:
        Unsupported, BadRequest: see ``build_module``.
    """
    assert outline.module is not None
    dtype = torch_dtype(outline.compute_dtype or "bfloat16")
    made = build_module(outline.module, dtype).state_dict()
    tensors = tuple(OutlinedTensor(name, dtype_name(dtype), tuple(each.shape)) for name, each in made.items())
    return msgspec.structs.replace(outline, tensors=tensors)


def _logical_infos(manifest: Manifest | Outline) -> dict[str, TensorInfo]:
    """Return the tensors as models see them: packed weights with their logical shapes, without companions."""
    infos = {spec.name: TensorInfo(spec.dtype, spec.shape) for spec in manifest.tensors}
    for packed in manifest.packed:
        for name in packed.companions.values():
            infos.pop(name, None)
        infos[packed.weight] = TensorInfo(infos[packed.weight].dtype, packed.shape, packed)
    return infos


def _match_class(
    described: ModuleDescription,
    tensors: Mapping[str, TensorInfo],
    models: ModelCache,
    class_models: ClassModels,
    compute_dtype: torch.dtype | None,
) -> CheckpointMatch | ModuleMatch:
    """Return the match of a family, if it runs this module and nothing in it was changed; else that of the class.

    What a checkpoint holds of a module is only known once it is built; a checkpoint is given to families as it is.
    """
    of_class = class_models.match(described, tensors) if described.state else None
    if not described.allows_family:
        return of_class or class_models.match(described, tensors, compute_dtype)
    if of_class is None:
        found = _match_family(tensors, models, compute_dtype)
    elif of_class.model.difference:
        found = f"it is not as its class makes it: {of_class.model.difference}"
    else:
        saved = {name: info for name, info in tensors.items() if name in of_class.model.saved_names}
        found = _match_family(saved, models, compute_dtype)
    if isinstance(found, CheckpointMatch):
        other = config_differences(described, found)
        if not other:
            return found if of_class is None else replace(found, made=of_class.model.made)
        found = f"{found.family.name}: its configuration differs: {listed(other)}"
    logger.info("%s runs as its class, since no family runs it: %s", described.class_name, found)
    return replace(of_class or class_models.match(described, tensors, compute_dtype), family_reason=found)


_FREE: Final = frozenset({"sample_size", "force_upcast", "out_channels", "decoder_base_dim"})
"""Settings that do not show in results, or that a class has under two values of the same meaning."""


def config_differences(described: ModuleDescription, match: CheckpointMatch) -> list[str]:
    """Return the settings of a module or a ``config.json`` that differ from those with which a family builds the class.

    Those that one of the two does not have are of no account, and so are those that jobs choose by themselves
    (``job_settings`` of the family).
    """
    built: Any = getattr(match.model.module, "config", None)
    given = settings_of(described)
    if hasattr(built, "to_dict"):  # of transformers
        built, given = _computed(built.to_dict()), _computed(given)
        given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(built, Mapping):  # a module of a family's own
        return []
    free = _FREE | getattr(match.family, "job_settings", frozenset())
    return [
        f"{name}={value!r:.100}"
        for name, value in given.items()
        if name in built and name not in free and _plain(built[name]) != _plain(value)
    ]


_COMPUTED: Final = (
    "hidden_act",
    "feed_forward_proj",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "rope_theta",
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "relative_attention_max_distance",
    "use_sliding_window",
)
"""Settings of transformers' classes that show in results and in no tensor. Most of the others are of training, of
sampling or of the tokenizer."""


def _computed(config: Mapping[str, object]) -> dict[str, object]:
    rope = config.get("rope_parameters")  # since transformers 5; before that, and in most files, beside the others
    every = {**config, **rope} if isinstance(rope, Mapping) else config
    return {name: every[name] for name in _COMPUTED if name in every}


def _plain(value: object) -> object:
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _match_family(
    tensors: Mapping[str, TensorInfo], models: ModelCache, compute_dtype: torch.dtype | None
) -> CheckpointMatch | str:
    """Return the match of a family, or why no family has one."""
    try:
        return models.match(tensors, None, compute_dtype)
    except (UnknownFamily, Unsupported, BadCheckpoint) as error:
        if isinstance(error, UnknownFamily) or isinstance(error.__cause__, UnknownFamily):
            return f"its tensor names are of none of {one_of([each.name for each in families()])}{load_faults_note()}"
        return error.detail[:SENTENCE_CHARS]
