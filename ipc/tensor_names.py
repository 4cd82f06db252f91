"""Prefixes of tensor names: remove what training scripts, wrappers and loaders add to a model's own names.

``torch.compile``, FSDP and activation checkpointing add a segment anywhere in a name; wrapper modules and all-in-one
checkpoints add one or several in front. No known model has a name of its own that starts with one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_PREFIXES: Final = re.compile(
    r"(?:(?:module|model|diffusion_model|transformer|text_encoder(?:_\d)?|text_encoders|clip_l|t5xxl|umt5xxl"
    r"|cond_stage_model|vae|first_stage_model)\.)+"
)
_WRAPPER_SEGMENTS: Final = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_TELLS_NOTHING: Final = re.compile(
    r"(?:^|\.)(?:scaled_fp8|position_ids|logit_scale|spiece_model|tekken_model|tokenizer_json)$|^loss\.|^logvar$"
)


def tells_nothing(bare: str) -> bool:
    """Return whether this tensor may be in files of any model: markers, counters, training losses, tokenizers."""
    return _TELLS_NOTHING.search(bare) is not None


def split_prefix(name: str) -> tuple[str, str]:
    """Split a tensor's name into its prefix and the model's own name."""
    bare = _WRAPPER_SEGMENTS.sub("", name) if "_mod" in name else name
    found = _PREFIXES.match(bare)
    return (found[0], bare[found.end() :]) if found else ("", bare)


def bare_name(name: str) -> str:
    """Return a tensor's name without its prefix."""
    return split_prefix(name)[1]


def by_prefix(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Group names by their prefix: for each, the given names by the model's own name (two of one are a duplicate)."""
    groups: dict[str, dict[str, list[str]]] = {}
    for name in names:
        prefix, bare = split_prefix(name)
        groups.setdefault(prefix, {}).setdefault(bare, []).append(name)
    return groups
