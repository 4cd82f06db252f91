"""Conditioning of generations: read from a file, or random, by the names and shapes that a transformer's facts list."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ArgumentFacts, TransformerFacts
from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    import torch

Conditioning = dict[str, "torch.Tensor | list[torch.Tensor]"]


def read_conditioning(path: Path, facts: TransformerFacts) -> Conditioning:
    """Read the tensors that the facts name; a missing batch axis is put in front, and lists are of one image.

    Raises:
        BadCheckpoint: the file is no sound safetensors file.
        BadRequest: it lacks one that is needed.
    """
    from xditd.client.tensor_files import read_tensors

    tensors = read_tensors(path)
    missing = [each.name for each in facts.conditioning if each.is_needed and each.name not in tensors]
    if missing:
        there = listed(tensors) or "no tensors"
        raise BadRequest(f"{path}: lacks {' and '.join(missing)}; it holds {there}", names=tensors)
    return {each.name: _shaped(tensors[each.name], each) for each in facts.conditioning if each.name in tensors}


def random_conditioning(facts: TransformerFacts, seed: int, text_tokens: int) -> Conditioning:
    """Draw normal values for all that one image needs, in the order of the facts: a test pattern, not a prompt.

    Raises:
        BadRequest: a side other than the batch and the tokens is open.
    """
    import torch

    sides = {"batch": 1, "tokens": text_tokens}
    generator = torch.Generator().manual_seed(seed)
    drawn: Conditioning = {}
    for each in facts.conditioning:
        if each.is_needed:
            tensor = torch.randn(*_sized(each, sides), generator=generator)
            drawn[each.name] = [tensor] if each.is_list else tensor
    return drawn


def _sized(facts: ArgumentFacts, sides: Mapping[str, int]) -> tuple[int, ...]:
    unknown = [side for side in facts.shape if isinstance(side, str) and side not in sides]
    if unknown:
        raise BadRequest(f"{facts.name}: its {listed(unknown)} cannot be told; give a file with it")
    return tuple(sides[side] if isinstance(side, str) else side for side in facts.shape)


def _shaped(tensor: torch.Tensor, facts: ArgumentFacts) -> torch.Tensor | list[torch.Tensor]:
    if facts.is_list:
        return list(tensor) if tensor.ndim == len(facts.shape) + 1 else [tensor]
    return tensor[None] if tensor.ndim == len(facts.shape) - 1 and facts.shape[:1] == ("batch",) else tensor
