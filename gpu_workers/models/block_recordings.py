"""What was recorded of a call of a block, and which tensors of the block are inputs of its graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from xditd.gpu_workers.models.block_attention import AttentionCall
from xditd.gpu_workers.models.block_graphs import TensorKind


@dataclass(frozen=True, slots=True)
class StateName:
    """A tensor of a block: the path of a submodule, which of its maps holds it, and the name there."""

    path: str
    kind: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What one call of a block computed.

    The inputs of the ``encoded`` graph, of these ``kinds``, are the ``arguments`` (numbers of the call's tensors) and
    then the ``state``.
    """

    encoded: bytes
    kinds: tuple[TensorKind, ...]
    arguments: tuple[int, ...]
    state: tuple[StateName, ...]
    attentions: tuple[AttentionCall, ...]
    packed: tuple[str, ...]
    """The paths of the packed layers that multiply, by their numbers in the graph."""
    results: Any
    """The block's result, with a ``Place`` for each tensor."""


_MAPS: Final = ("_parameters", "_buffers", "__dict__")


def state_of(block: torch.nn.Module) -> Iterator[tuple[StateName, torch.Tensor]]:
    """Yield the tensors of a block: parameters, buffers, and attributes that are tensors."""
    for path, submodule in block.named_modules():
        for kind in _MAPS:
            for name, value in getattr(submodule, kind).items():
                if isinstance(value, torch.Tensor):
                    yield StateName(path, kind, name), value


def holder(block: torch.nn.Module, name: StateName) -> Mapping[str, torch.Tensor]:
    """Return the map of a block's submodule that holds a tensor."""
    found: Mapping[str, torch.Tensor] = getattr(block.get_submodule(name.path), name.kind)
    return found
