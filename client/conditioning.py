"""Conditioning for generations: selected from a file's tensors or random, by a transformer's facts."""

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
    """Select the tensors that the facts name; a missing batch dimension is added in front.

    A list of one tensor for each image is ``NAME.0``, ``NAME.1`` and so on, or ``NAME``: of one image, or with a row
    for each. Tensors with other names are ignored. ``where`` names their source in messages, such as a file.

    Raises:
        BadRequest: a required tensor or a number of a list is missing, a list is given in both ways, or the component
            is not a transformer.
    """
    taken = _conditioning(facts)
    chosen: Conditioning = {}
    for each in taken:
        value = _select(tensors, each, where)
        if value is not None:
            chosen[each.name] = value
    missing = [_name_text(each) for each in taken if each.is_needed and each.name not in chosen]
    if missing:
        there = listed(tensors) or "no tensors"
        raise BadRequest(f"{where}: lacks {' and '.join(missing)}; it holds {there}", names=tensors)
    return chosen


def random_conditioning(facts: ComponentFacts, seed: int, text_tokens: int) -> Conditioning:
    """Draw normal values for each required tensor of one image, in the order of the facts: a test pattern, no prompt.

    Raises:
        BadRequest: a dimension other than batch and tokens has no fixed size, or the component is not a transformer.
    """
    import torch

    sides = {"batch": 1, "tokens": text_tokens}
    generator = torch.Generator().manual_seed(seed)
    drawn: Conditioning = {}
    for each in _conditioning(facts):
        if each.is_needed:
            tensor = torch.randn(*_shape_of(each, sides), generator=generator)
            drawn[each.name] = [tensor] if each.is_list else tensor
    return drawn


def _conditioning(facts: ComponentFacts) -> tuple[ArgumentFacts, ...]:
    if facts.transformer is None:
        raise BadRequest(f"{facts.class_name}: a {facts.kind.value} takes no conditioning; name a transformer")
    return facts.transformer.conditioning


def _shape_of(facts: ArgumentFacts, sides: Mapping[str, int]) -> tuple[int, ...]:
    unknown = [side for side in facts.shape if isinstance(side, str) and side not in sides]
    if unknown:
        raise BadRequest(f"{facts.name}: its size of {listed(unknown)} is unknown; give a file with it")
    return tuple(sides[side] if isinstance(side, str) else side for side in facts.shape)


def _select(
    tensors: Mapping[str, torch.Tensor], facts: ArgumentFacts, where: str
) -> torch.Tensor | list[torch.Tensor] | None:
    whole = tensors.get(facts.name)
    if not facts.is_list:
        has_no_batch = whole is not None and whole.ndim == len(facts.shape) - 1 and facts.shape[:1] == ("batch",)
        return whole[None] if whole is not None and has_no_batch else whole
    prefix = f"{facts.name}."
    count = sum(name.startswith(prefix) and name.removeprefix(prefix).isdecimal() for name in tensors)
    if count == 0:
        return None if whole is None else list(whole) if whole.ndim == len(facts.shape) + 1 else [whole]
    if whole is not None:
        raise BadRequest(f"{where}: holds both {facts.name} and {prefix}0 and on; leave one of them out")
    numbered = [f"{prefix}{number}" for number in range(count)]
    for name in numbered:
        if name not in tensors:
            there = listed(each for each in tensors if each.startswith(prefix))
            raise BadRequest(f"{where}: lacks {name}, but holds {there}; number the images from 0, leaving out none")
    return [tensors[name] for name in numbered]


def _name_text(facts: ArgumentFacts) -> str:
    return f"{facts.name} (or {facts.name}.0 and on, one for each image)" if facts.is_list else facts.name
