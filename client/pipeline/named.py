"""Pipelines by their names in ``models.toml``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from xditd.client.pipeline.files import PathLike
from xditd.client.pipeline.sources import IMAGE_ENCODER, SECOND, TRANSFORMER, VAE
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    from xditd.client.models_file import ModelEntry


def entry_of(source: PathLike) -> dict[str, Any]:
    """Return the entry of ``models.toml`` of this name, as arguments of ``open``; empty for a path.

    Raises:
        BadRequest: there is no such entry, or it is wrong; or the name is that of an entry and of another file or
            folder here, which would be another model or lack the entry's defaults.
    """
    if not isinstance(source, str) or os.sep in source or source.startswith("~"):
        return {}
    from xditd.client import models_file

    is_path = os.path.exists(source)
    if is_path and source not in models_file.names():
        return {}
    entry = models_file.find(source)
    own = entry.folder or entry.checkpoint
    if is_path and not (own and os.path.exists(own) and os.path.samefile(own, source)):
        raise BadRequest(
            f"model {source!r:.200}: {models_file.models_path()} has one of this name, and the current folder another: "
            f"give {os.path.join(os.curdir, source)!r} for that here, or rename one of the two"
        )
    return arguments_of(entry)


def arguments_of(entry: ModelEntry) -> dict[str, Any]:
    """Return an entry of ``models.toml`` as arguments of ``open``."""
    size = entry.defaults.size
    return {
        "name": entry.name,
        "source": entry.folder or entry.checkpoint,
        "variant": entry.variant,
        TRANSFORMER: entry.transformer,
        SECOND: entry.transformer_2,
        VAE: entry.vae,
        "text_encoders": entry.text_encoders,
        "tokenizers": entry.tokenizers,
        IMAGE_ENCODER: entry.image_encoder,
        "scheduler": entry.scheduler,
        "compute_dtype": entry.compute_dtype,
        "acceleration": entry.acceleration,
        "defaults": {
            name: value
            for name, value in (
                ("steps", entry.defaults.steps),
                ("guidance", entry.defaults.guidance),
                ("width", size and size[0]),
                ("height", size and size[1]),
            )
            if value is not None
        },
    }
