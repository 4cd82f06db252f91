"""The record of a call of a pipeline, with the hashes of its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xditd import __version__
from xditd.client.metadata.file_hashes import describe
from xditd.client.metadata.of_jobs import strength_of
from xditd.client.metadata.record import FileRecord, InputsRecord, LoraRecord, ModelRecord, Record
from xditd.client.model_folders import find_model
from xditd.ipc.errors import XditdError

if TYPE_CHECKING:
    from xditd.client.pipeline.settings import RunSettings


def record_of_run(settings: RunSettings, index: int, count: int, *, embeds: str | None = None) -> Record:
    """Return how the picture or video of an ``index`` was made, among the ``count`` of a call.

    ``embeds`` is the file of the text embeddings that a call had in place of words. Files are read for their hashes;
    one that has changed since it was lent has its name alone.
    """
    prompts, negatives = settings.prompts, settings.negative_prompts

    def takes(argument: str) -> bool:
        return argument not in settings.refused

    group = index // max(1, settings.num_images)
    return Record(
        version=__version__,
        prompt=prompts[group] if prompts else None,
        prompt_2=settings.prompts_2[group] if settings.prompts_2 else None,
        negative_prompt=negatives[group % len(negatives)] if negatives and takes("negative_prompt") else None,
        max_sequence_length=settings.max_sequence_length,
        seed=settings.seed,
        index=index,
        num_images=count,
        width=settings.width,
        height=settings.height,
        frames=settings.frames,
        fps=settings.fps if settings.frames > 1 else None,
        steps=settings.steps,
        guidance=settings.guidance if takes("guidance") else None,
        strength=settings.strength if settings.has_image and takes("strength") else None,
        step_cache=settings.step_cache,
        options=dict(settings.options),
        variant=None if settings.variant == "class" else settings.variant,
        model=ModelRecord(
            name=settings.model,
            family=settings.family,
            files=files_of(settings),
        ),
        loras=tuple(
            LoraRecord(
                file=describe(each.path, read_ns=each.lent_ns), strength=strength_of(each.strength), roles=each.roles
            )
            for each in settings.loras
        ),
        inputs=InputsRecord(
            image=int(settings.has_image),
            mask=int(settings.has_mask),
            last_image=int(settings.has_last_image),
            references=settings.references,
            control=int(settings.has_control),
            embeds=None if embeds is None else describe(embeds),
            conditioning=not prompts and embeds is None,
            sigmas=settings.has_sigmas,
        ),
    )


def files_of(settings: RunSettings) -> dict[str, tuple[FileRecord, ...]]:
    """Describe the files of a model by role, of folders those of the weights, and the scheduler by its values."""
    found = {role: tuple(_files(paths, settings.lent_ns.get(role))) for role, paths in settings.files.items()}
    if settings.scheduler is not None:
        values = json.dumps(settings.scheduler, sort_keys=True, default=str).encode()
        found["scheduler"] = (FileRecord(name="scheduler_config.json", sample=hashlib.sha256(values).hexdigest()),)
    return found


def _files(paths: tuple[str, ...], lent_ns: int | None) -> Iterator[FileRecord]:
    """Describe files, and those of the weights in folders."""
    for path in paths:
        found: tuple[str, ...] = (path,)
        if os.path.isdir(path) or path.endswith(".json"):
            with contextlib.suppress(XditdError):  # several variants: its name says which model it is
                found = find_model(path, has_class=False).paths
        yield from (describe(each, read_ns=lent_ns) for each in found)
