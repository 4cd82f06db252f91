"""What ``Pipeline.open`` is given: a folder, a file, parts or a name, as the parts of a pipeline and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xditd.client.pipeline.files import PathLike, Paths, find_source
from xditd.client.pipeline.named import entry_of
from xditd.client.pipeline.sources import IMAGE_ENCODER, Source
from xditd.ipc.errors import BadRequest
from xditd.ipc.tensors import Acceleration, ComputeDType


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The parts of a pipeline, and how they are lent. ``defaults`` are those of its calls."""

    source: Source
    compute_dtype: ComputeDType | None
    acceleration: Acceleration | None
    defaults: Mapping[str, Any] | None


def opening_of(
    source: PathLike | None,
    *,
    parts: Mapping[str, PathLike | None],
    text_encoders: Paths,
    tokenizers: PathLike | Mapping[str, PathLike] | None,
    scheduler: PathLike | Mapping[str, Any] | None,
    variant: str | None,
    compute_dtype: ComputeDType | None,
    acceleration: Acceleration | None,
    name: str | None,
    defaults: Mapping[str, Any] | None,
) -> Opening:
    """Find the parts. Arguments are those of ``open``; they come before those of an entry of ``models.toml``.

    Raises:
        BadRequest, BadCheckpoint, Unsupported: as ``Pipeline.open``.
    """
    entry: dict[str, Any] = entry_of(source) if source is not None else {}
    if entry:
        source, variant = entry.get("source"), variant or entry.get("variant")
        parts = {role: parts[role] or entry.get(role) for role in parts}
        text_encoders = text_encoders or entry.get("text_encoders", ())
        tokenizers = tokenizers if tokenizers is not None else entry.get("tokenizers")
        scheduler = scheduler if scheduler is not None else entry.get("scheduler")
        compute_dtype = compute_dtype or entry.get("compute_dtype")
        acceleration = acceleration or entry.get("acceleration")
        defaults = {**entry.get("defaults", {}), **(defaults or {})}
        name = name or entry.get("name")
    found = find_source(
        source,
        parts=parts,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
        scheduler=scheduler,
        variant=variant,
        name=name,
    )
    if acceleration is not None and IMAGE_ENCODER not in found.parts:
        raise BadRequest(
            f"acceleration {acceleration!r} would have no effect: {found.name} has no image_encoder, and families "
            "run its other parts; leave it out"
        )
    return Opening(source=found, compute_dtype=compute_dtype, acceleration=acceleration, defaults=defaults)
