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
from xditd.gpu_workers.models.class_models import ClassModels, load_dtype
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

_REASON_CHARS: Final = 2 * SENTENCE_CHARS
"""Characters that are kept of the reason why no family runs a module."""
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
        kind = None
        if manifest.kind is not None and manifest.kind is not ComponentKind.MODULE:
            kind = cast(Kind, manifest.kind.value)
        if manifest.module is not None:
            if manifest.packed and manifest.module.state:
                raise Unsupported(
                    "packed weights of a module cannot be run: lend its file, its folder or its state dict"
                )
            return _match_described(kind, manifest.module, tensors, models, class_models, compute_dtype, taken)
        if manifest.kind is ComponentKind.MODULE:
            raise BadRequest("a module is lent without the description of its class; lend the module itself")
        if manifest.kind is None:
            described = describe({name: info.shape for name, info in tensors.items()})
            if described is not None:
                found = class_models.match(described, tensors, compute_dtype)
                return replace(found, family_reason=f"a file of a {found.model.class_name} always runs as its class")
        return models.match(tensors, kind, compute_dtype, taken)
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


def _match_described(
    kind: Kind | None,
    described: ModuleDescription,
    tensors: Mapping[str, TensorInfo],
    models: ModelCache,
    class_models: ClassModels,
    compute_dtype: torch.dtype | None,
    taken: Collection[int],
) -> CheckpointMatch | ModuleMatch:
    """Return the match of a family, if it runs this module and nothing in it was changed; else that of the class.

    With a ``kind`` only the families of that kind are asked, not the class. Families see those tensors of a live module
    that its class saves, which are known once the class is built; they see all tensors of a checkpoint.

    Raises:
        BadRequest: a kind is given, but the module was lent to run as its class.
        UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported: no family of the kind fits, or without a kind
            neither a family nor the class.
    """
    if kind is not None and not described.allows_family:
        raise BadRequest(f"the kind {kind} is of a family, and it is lent as its class: leave one of them out")
    of_class = class_models.match(described, tensors) if described.state else None
    reason = ""
    if described.allows_family:
        try:
            return _match_family(kind, described, tensors, of_class, models, compute_dtype, taken)
        except (UnknownFamily, Unsupported, BadCheckpoint) as error:
            if kind is not None:
                raise
            reason = _family_reason(error)
        logger.info("%s runs as its class, since no family runs it: %s", described.class_name, reason)
    return replace(of_class or class_models.match(described, tensors, compute_dtype), family_reason=reason)


def _match_family(
    kind: Kind | None,
    described: ModuleDescription,
    tensors: Mapping[str, TensorInfo],
    of_class: ModuleMatch | None,
    models: ModelCache,
    compute_dtype: torch.dtype | None,
    taken: Collection[int],
) -> CheckpointMatch:
    """Return the match of a family that runs this module.

    ``of_class`` is the match of a live module's class, else ``None``.

    Raises:
        UnknownFamily, BadCheckpoint, UnsupportedDtype: as :meth:`ModelCache.match`.
        Unsupported: likewise; or the module was changed, or the family computes with other settings than the module.
    """
    remedy = "" if kind is None else f"; {_WITHOUT_KIND}"
    if of_class is not None:
        if of_class.model.difference:
            raise Unsupported(f"it is not as its class makes it: {of_class.model.difference}{remedy}")
        tensors = {name: info for name, info in tensors.items() if name in of_class.model.saved_names}
    load_dtypes = _load_dtypes(described, tensors, compute_dtype)
    found = models.match(tensors, kind, compute_dtype, taken, settings_of(described), load_dtypes)
    if other := config_differences(described, found):
        built = "" if kind is None else " (the family computes with {})"
        differing = listed(each.given + built.format(each.built) for each in other)
        raise Unsupported(
            f"{found.family.name}: its configuration differs: {differing}{remedy}", names=[each.name for each in other]
        )
    return found if of_class is None else replace(found, made=of_class.model.made)


def _load_dtypes(
    described: ModuleDescription, tensors: Mapping[str, TensorInfo], compute_dtype: torch.dtype | None
) -> LoadDtypes | None:
    """Return the dtypes in which diffusers loads a checkpoint with this ``config.json``.

    Returns ``None`` for a live module, whose tensors keep their dtypes, and for a class that diffusers does not have.

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
    return LoadDtypes.of(kind, load_dtype(kind, as_loaded(tensors, compute_dtype), compute_dtype))


def _family_reason(error: RequestError) -> str:
    """Say why no family runs a module, from the error of its match."""
    if isinstance(error, UnknownFamily) or isinstance(error.__cause__, UnknownFamily):
        return f"its tensor names are of none of {one_of([each.name for each in families()])}{load_faults_note()}"
    return error.detail[:_REASON_CHARS]
