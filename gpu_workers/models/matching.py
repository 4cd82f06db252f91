"""Match a manifest to what runs it: a family that knows its tensors, or the class that it describes."""

from __future__ import annotations

from collections.abc import Mapping

from xditd.gpu_workers.models.class_models import ClassModels, ModuleMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import CheckpointMatch, ModelCache
from xditd.ipc.errors import BadCheckpoint, BadRequest, RequestError, UnknownFamily, Unsupported, named
from xditd.ipc.tensors import ComponentKind, Manifest, ModuleDescription


def match_manifest(manifest: Manifest, models: ModelCache, class_models: ClassModels) -> CheckpointMatch | ModuleMatch:
    """Match a manifest to a model of a family, or to a module that runs as its class.

    Raises:
        UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported: the tensors do not fit.
        BadRequest: a module without its description, or a description that cannot be read.
    """
    try:
        tensors = {spec.name: TensorInfo(spec.dtype, spec.shape) for spec in manifest.tensors}
        if manifest.module is not None:
            return _match_class(manifest.module, tensors, models, class_models)
        if manifest.kind is ComponentKind.MODULE:
            raise BadRequest("a module is lent without the description of its class; lend the module itself")
        return models.match(tensors, None if manifest.kind is None else manifest.kind.value)
    except RequestError as error:
        raise named(manifest.label, error) from error


def _match_class(
    described: ModuleDescription,
    tensors: Mapping[str, TensorInfo],
    models: ModelCache,
    class_models: ClassModels,
) -> CheckpointMatch | ModuleMatch:
    """Return the match of a family, if it runs this module and nothing in it was changed; else that of the class.

    What a checkpoint holds of a module is only known once it is built; a checkpoint is given to families as it is.
    """
    if not described.state:
        family = _match_family(tensors, models) if described.allows_family else None
        return family or class_models.match(described, tensors)
    match = class_models.match(described, tensors)
    if not described.allows_family or not match.model.is_as_made:
        return match
    saved = {name: info for name, info in tensors.items() if name in match.model.saved_names}
    return _match_family(saved, models) or match


def _match_family(tensors: Mapping[str, TensorInfo], models: ModelCache) -> CheckpointMatch | None:
    try:
        return models.match(tensors)
    except (UnknownFamily, Unsupported, BadCheckpoint):
        return None
