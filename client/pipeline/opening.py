"""What ``Pipeline.open`` is given: a folder, a file, parts or a name, as the parts of a pipeline and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from xditd.client.pipeline.adapter import Adapter
from xditd.client.pipeline.calls import check_defaults
from xditd.client.pipeline.families import adapter_for
from xditd.client.pipeline.files import PathLike, Paths, find_source
from xditd.client.pipeline.folders import PIPELINES
from xditd.client.pipeline.named import arguments_of, entry_of
from xditd.client.pipeline.sources import IMAGE_ENCODER, SECOND, TRANSFORMER, VAE, Source
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.tensors import Acceleration, ComputeDType

if TYPE_CHECKING:
    from xditd.client.models_file import ModelEntry

_PARTS: Final = (TRANSFORMER, SECOND, VAE, IMAGE_ENCODER)


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
    return _opening(
        source,
        parts=parts,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
        scheduler=scheduler,
        variant=variant,
        compute_dtype=compute_dtype,
        acceleration=acceleration,
        name=name,
        defaults=defaults,
    )


def opening_of_entry(entry: ModelEntry) -> Opening:
    """Find the parts of an entry of ``models.toml``.

    Raises:
        BadRequest, BadCheckpoint, Unsupported: as ``Pipeline.open``.
    """
    given = arguments_of(entry)
    return _opening(given.pop("source"), parts={role: given.pop(role) for role in _PARTS}, **given)


def _opening(
    source: PathLike | None,
    *,
    compute_dtype: ComputeDType | None,
    acceleration: Acceleration | None,
    defaults: Mapping[str, Any] | None,
    **given: Any,
) -> Opening:
    found = find_source(source, **given)
    if acceleration is not None and IMAGE_ENCODER not in found.parts:
        raise BadRequest(
            f"acceleration {acceleration!r} would have no effect: {found.name} has no image_encoder, and families "
            "run its other parts; leave it out"
        )
    return Opening(source=found, compute_dtype=compute_dtype, acceleration=acceleration, defaults=defaults)


def rules_of(source: Source, facts: ComponentFacts, given: Mapping[str, Any] | None) -> tuple[Adapter, dict[str, Any]]:
    """Return what a pipeline makes of the arguments of a call, and what it uses for those that a call does not have.

    ``facts`` are those of its transformer, ``given`` the defaults with which it is opened.

    Raises:
        Unsupported: its folder is of another family than its transformer, or has a value that is not computed.
        BadCheckpoint: a value of the folder cannot be.
        BadRequest: as ``check_defaults``.
    """
    assert facts.transformer is not None  # lent as a transformer
    wanted = PIPELINES.get(source.pipeline_class or "", facts.family)
    if wanted != facts.family:
        raise Unsupported(
            f"{source.name}: the folder is of a {source.pipeline_class}, and its transformer of {facts.family}; open "
            "the parts of one model"
        )
    adapter = adapter_for(facts.family, facts.transformer, source, f"{facts.family} ({source.name})")
    known = {**adapter.defaults(), "negative_prompt": None, "num_images": 1}
    chosen = check_defaults(given, known, adapter.refused(), adapter.title)
    adapter.chosen = frozenset(chosen)
    return adapter, {**known, **chosen}
