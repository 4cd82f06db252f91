"""Conditioning of generations, chosen from tensors or random, by names and shapes of a transformer's facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ArgumentFacts, ComponentFacts
from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    import torch

Conditioning = dict[str, "torch.Tensor | list[torch.Tensor]"]


def conditioning_of(tensors: Mapping[str, torch.Tensor], facts: ComponentFacts, where: str) -> Conditioning:
    """Choose the tensors that the facts name; a missing batch axis is put in front, and lists are of one image.

    ``where`` names what they come from, such as a file.

    Raises:
        BadRequest: one that is needed is missing, or it is no transformer.
    """
    taken = _conditioning(facts)
    missing = [each.name for each in taken if each.is_needed and each.name not in tensors]
    if missing:
        there = listed(tensors) or "no tensors"
        raise BadRequest(f"{where}: lacks {' and '.join(missing)}; it holds {there}", names=tensors)
    return {each.name: _shaped(tensors[each.name], each) for each in taken if each.name in tensors}


def random_conditioning(facts: ComponentFacts, seed: int, text_tokens: int) -> Conditioning:
    """Draw normal values for all that one image needs, in the order of the facts: a test pattern, not a prompt.

    Raises:
        BadRequest: a side other than the batch and the tokens is open, or it is no transformer.
    """
    import torch

    sides = {"batch": 1, "tokens": text_tokens}
    generator = torch.Generator().manual_seed(seed)
    drawn: Conditioning = {}
    for each in _conditioning(facts):
        if each.is_needed:
            tensor = torch.randn(*_sized(each, sides), generator=generator)
            drawn[each.name] = [tensor] if each.is_list else tensor
    return drawn


def _conditioning(facts: ComponentFacts) -> tuple[ArgumentFacts, ...]:
    if facts.transformer is None:
        raise BadRequest(f"{facts.class_name}: a {facts.kind.value} takes no conditioning; name a transformer")
    return facts.transformer.conditioning


def _sized(facts: ArgumentFacts, sides: Mapping[str, int]) -> tuple[int, ...]:
    unknown = [side for side in facts.shape if isinstance(side, str) and side not in sides]
    if unknown:
        raise BadRequest(f"{facts.name}: its {listed(unknown)} cannot be told; give a file with it")
    return tuple(sides[side] if isinstance(side, str) else side for side in facts.shape)


def _shaped(tensor: torch.Tensor, facts: ArgumentFacts) -> torch.Tensor | list[torch.Tensor]:
    if facts.is_list:
        return list(tensor) if tensor.ndim == len(facts.shape) + 1 else [tensor]
    return tensor[None] if tensor.ndim == len(facts.shape) - 1 and facts.shape[:1] == ("batch",) else tensor
