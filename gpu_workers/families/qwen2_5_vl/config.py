"""The sizes of a language model of Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Qwen25VlConfig:
    """The sizes of a language model: ``heads`` of queries share ``key_heads`` of keys; ``inner`` is the MLP's width."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
