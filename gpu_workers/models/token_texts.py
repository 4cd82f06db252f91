"""What the recipes of prompts share: texts to padded token ids, and the option of their length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from xditd.gpu_workers.models.prompts import Tokens
from xditd.ipc.errors import BadRequest

MAX_LENGTH: Final = "max_sequence_length"
"""The option that says to how many tokens texts are padded and cut, as diffusers' pipelines name it."""


def length_option(options: Mapping[str, float], *, default: int, most: int) -> int:
    """Return the value of :data:`MAX_LENGTH`.

    Raises:
        BadRequest: no whole number from 1 to ``most``.
    """
    given = options.get(MAX_LENGTH, default)
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
        raise BadRequest(f"options: {MAX_LENGTH} is {given!r}; use a whole number from 1 to {most}")
    return given


def tokenized(tokenizer: Any, texts: Sequence[str], length: int, **more: Any) -> Tokens:
    """Tokenize texts, cut and padded to ``length`` tokens, with a mask that is 0 for padding.

    ``more`` are further arguments of the tokenizer.
    """
    found = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt", **more
    )
    return Tokens(found.input_ids, found.attention_mask)
