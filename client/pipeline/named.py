"""Pipelines by their names in ``models.toml``."""

from __future__ import annotations

import os
from typing import Any

from xditd.client.pipeline.files import PathLike
from xditd.client.pipeline.sources import IMAGE_ENCODER, SECOND, TRANSFORMER, VAE


def entry_of(source: PathLike) -> dict[str, Any]:
    """Return the entry of ``models.toml`` of this name, as arguments of ``open``; empty for a path."""
    if not isinstance(source, str) or os.sep in source or source.startswith("~") or os.path.exists(source):
        return {}
    from xditd.client import models_file

    entry = models_file.find(source)
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
