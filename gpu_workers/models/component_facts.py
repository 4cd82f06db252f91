"""What clients are told of a component that was found to fit a family."""

from __future__ import annotations

from collections import Counter

from xditd.gpu_workers.models.model_cache import CheckpointMatch
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.tensors import ComponentKind, DType, Manifest
from xditd.ipc.transports.tensor_views import dtype_name


def facts_of(match: CheckpointMatch, manifest: Manifest) -> ComponentFacts:
    """Ask the family for what it says of its kind, and count the bytes."""
    model = match.model
    kind = match.family.kind
    transformer = vae = text_encoder = None
    if kind == "transformer":
        transformer = model.operations_for(kind).facts(match.config, model.layout)
    elif kind == "vae":
        vae = model.operations_for(kind).facts(match.config)
    else:
        text_encoder = model.operations_for(kind).facts(match.config)
    sizes: Counter[DType] = Counter()
    for spec in manifest.tensors:
        sizes[spec.dtype] += spec.extent_bytes
    return ComponentFacts(
        family=match.family.name,
        class_name=class_of(model.module),
        kind=ComponentKind(kind),
        dtype=dtype_name(match.dtype),
        bytes_by_dtype=dict(sizes),
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
    )


def class_of(module: object) -> str:
    """Name the class of diffusers or transformers that a module is, or is derived from."""
    for kind in type(module).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in ("diffusers", "transformers"):
            return kind.__name__
    return type(module).__name__
