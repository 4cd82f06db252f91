"""The sizes of language models, and the constants of each kind that no tensor shows.

Sources: the ``config.json`` beside the weights of Qwen3-4B, Qwen3-8B and Mistral-Small-3.2-24B-Instruct-2506.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_SIZE = 128


@dataclass(frozen=True, slots=True)
class LanguageModelConfig:
    """The sizes of a decoder: ``heads`` of queries share ``key_heads`` of keys and values; ``inner`` is the MLP's.

    ``has_head_norms``: queries and keys are normalised (Qwen3). ``has_final_norm``: so are the states after the last
    layer; files for FLUX.2 that hold only the first layers of Mistral Small 3 have no such norm.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    has_head_norms: bool
    rope_theta: float
    epsilon: float
    has_final_norm: bool = True
