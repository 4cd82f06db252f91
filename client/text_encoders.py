"""Text encoders, as they are told by the names of their tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

_MARKS: Final = ("text_model.encoder.layers.", "encoder.block.0.layer.", "embeddings.token_embedding.weight")


def is_text_encoder(names: Collection[str]) -> bool:
    """Say whether these are the tensors of a CLIP text model or of a T5 encoder, under any prefix."""
    return any(mark in name for name in names for mark in _MARKS)
