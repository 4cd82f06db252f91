"""Match a manifest to what runs it: a family that knows its tensors, or the class that it describes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final, cast

import msgspec
import torch

from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.class_defaults import settings_of
from xditd.gpu_workers.models.class_models import ClassModels, chosen_dtype
from xditd.gpu_workers.models.config_differences import config_differences
from xditd.gpu_workers.models.configured_classes import HERE, build_module
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.lora_match import LoraMatch, match_lora
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.module_match import ModuleMatch
from xditd.gpu_workers.models.packed_modules import as_loaded
from xditd.gpu_workers.models.pretrained import LoadDtypes
from xditd.gpu_workers.models.registry import describe, families, load_faults_note
from xditd.gpu_workers.models.tokenizer_match import TokenizerMatch
from xditd.ipc.errors import BadCheckpoint, BadRequest, RequestError, UnknownFamily, Unsupported, named
from xditd.ipc.name_lists import SENTENCE_CHARS, listed
from xditd.ipc.outlines import Outline, OutlinedTensor
from xditd.ipc.recognition import one_of
from xditd.ipc.tensors import ComponentKind, Manifest, ModuleDescription
from xditd.ipc.transports.module_classes import find_class
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype

logger = logging.getLogger(__name__)

LoadedMatch = CheckpointMatch | ModuleMatch | LoraMatch
AnyMatch = LoadedMatch | TokenizerMatch

_WITHOUT_KIND: Final = (
    "lend it without a kind to run it as its class, by call(), or a state dict of its tensors to run it with the "
    "family's settings"
)


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
            if manifest.kind in (None, ComponentKind.MODULE):
                return _match_class(manifest.module, tensors, models, class_models, compute_dtype, taken)
            kind = cast(Kind, manifest.kind.value)
            return _match_kind(kind, manifest.module, tensors, models, class_models, compute_dtype, taken)
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
    taken: Collection[int],
) -> CheckpointMatch | ModuleMatch:
    """Return the match of a family, if it runs this module and nothing in it was changed; else that of the class.

    What a checkpoint holds of a module is only known once it is built; a checkpoint is given to families as it is.
    """
    of_class = class_models.match(described, tensors) if described.state else None
    if not described.allows_family:
        return of_class or class_models.match(described, tensors, compute_dtype)
    if of_class is None:
        found = _match_family(described, tensors, models, compute_dtype, taken)
    elif of_class.model.difference:
        found = f"it is not as its class makes it: {of_class.model.difference}"
    else:
        found = _match_family(described, _saved(tensors, of_class), models, compute_dtype, taken)
    if isinstance(found, CheckpointMatch):
        other = config_differences(described, found)
        if not other:
            return found if of_class is None else replace(found, made=of_class.model.made)
        found = f"{found.family.name}: its configuration differs: {listed(each.given for each in other)}"
    logger.info("%s runs as its class, since no family runs it: %s", described.class_name, found)
    return replace(of_class or class_models.match(described, tensors, compute_dtype), family_reason=found)


def _match_kind(
    kind: Kind,
    described: ModuleDescription,
    tensors: Mapping[str, TensorInfo],
    models: ModelCache,
    class_models: ClassModels,
    compute_dtype: torch.dtype | None,
    taken: Collection[int],
) -> CheckpointMatch:
    """Return the match of the family of a kind, if it runs this module and nothing in it was changed.

    Raises:
        UnknownFamily, BadCheckpoint, UnsupportedDtype, BadRequest: as ``ModelCache.match``.
        Unsupported: so, or the family computes with other settings than those of the module.
    """
    if not described.allows_family:
        raise BadRequest(f"the kind {kind} is of a family, and it is lent as its class: leave one of them out")
    of_class = class_models.match(described, tensors) if described.state else None
    if of_class is not None:
        if of_class.model.difference:
            raise Unsupported(f"it is not as its class makes it: {of_class.model.difference}; {_WITHOUT_KIND}")
        tensors = _saved(tensors, of_class)
    loading = _loading(described, tensors, compute_dtype)
    found = models.match(tensors, kind, compute_dtype, taken, settings_of(described), loading)
    if other := config_differences(described, found):
        differing = listed([f"{each.given} (the family computes with {each.built})" for each in other])
        raise Unsupported(
            f"{found.family.name}: its configuration differs: {differing}; {_WITHOUT_KIND}",
            names=[each.name for each in other],
        )
    return found if of_class is None else replace(found, made=of_class.model.made)


def _saved(tensors: Mapping[str, TensorInfo], of_class: ModuleMatch) -> dict[str, TensorInfo]:
    """Return the tensors that a checkpoint of the module has."""
    return {name: info for name, info in tensors.items() if name in of_class.model.saved_names}


def _loading(
    described: ModuleDescription, tensors: Mapping[str, TensorInfo], compute_dtype: torch.dtype | None
) -> LoadDtypes | None:
    """Return the dtypes in which diffusers loads a checkpoint with this ``config.json``.

    ``None`` of a live module, whose tensors have them already, and of a class that diffusers does not have.

    Raises:
        Unsupported, UnsupportedDtype: as ``ClassModels.match``.
    """
    if described.state or not described.class_name.startswith("diffusers:"):
        return None
    from diffusers.models.modeling_utils import ModelMixin

    try:
        kind = find_class(described.class_name, HERE)
    except Unsupported:  # such as WanModel, of the original repository
        return None
    if not issubclass(kind, ModelMixin):
        return None
    return LoadDtypes.of(kind, chosen_dtype(kind, as_loaded(tensors, compute_dtype), compute_dtype))


def _match_family(
    described: ModuleDescription,
    tensors: Mapping[str, TensorInfo],
    models: ModelCache,
    compute_dtype: torch.dtype | None,
    taken: Collection[int],
) -> CheckpointMatch | str:
    """Return the match of a family, or why no family has one."""
    try:
        loading = _loading(described, tensors, compute_dtype)
        return models.match(tensors, None, compute_dtype, taken, settings_of(described), loading)
    except (UnknownFamily, Unsupported, BadCheckpoint) as error:
        if isinstance(error, UnknownFamily) or isinstance(error.__cause__, UnknownFamily):
            return f"its tensor names are of none of {one_of([each.name for each in families()])}{load_faults_note()}"
        return error.detail[:SENTENCE_CHARS]
