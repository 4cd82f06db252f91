"""Token plans: what of a class's forward is a sequence of tokens, where ranks split it, and where they gather it.

A plan is data that a reader can check against the source of the class. Paths are those of submodules. A ``*`` stands
for any one name: ``transformer_blocks.*.attn`` is the attention of every block. The empty path is the module itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Final

PLANS: Final = "xditd.gpu_workers.plans"
"""The package of the plans, which this one does not import: they use the words of models."""


@dataclass(frozen=True, slots=True)
class Split:
    """A tensor, or each tensor of a list, tuple or map, that holds a stream's tokens along ``dim``.

    ``stream`` is a name of the plan's own. A tensor with one entry along ``dim``, or with another number of dimensions
    than ``ndim`` (if given), stays whole.
    """

    stream: str
    dim: int = 1
    ndim: int | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """The tokens of the queries and of the keys of an attention: streams, in the order in which the class joins them.

    Without streams, every rank has all of them. ``others`` are further attentions that the same submodule computes
    after the first, each with its own declaration.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    others: tuple[Attention, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """The token plan of one class.

    ``splits``: by path, the arguments of a submodule (by name), or its results (by number), that ranks split.
    ``gathers``: by path, the results of a submodule (by number) that ranks gather.
    ``attentions``: by path, every submodule that computes attention over tokens.
    ``whole``: paths of submodules with attention that no rank splits, such as refiners of a text.
    """

    splits: Mapping[str, Mapping[str | int, Split]]
    gathers: Mapping[str, Mapping[int, Split]]
    attentions: Mapping[str, Attention]
    whole: tuple[str, ...] = ()
    streams: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        found = {each.stream for splits in self.splits.values() for each in splits.values()}
        object.__setattr__(self, "streams", frozenset(found))


def find_plan(class_name: str) -> TokenPlan | str:
    """Return the plan of a class of diffusers, or the reason why it has none."""
    found: TokenPlan | str = import_module(PLANS).find(class_name)
    return found


def matches(pattern: str, path: str) -> bool:
    """Return whether a path is one that a pattern names."""
    wanted, given = pattern.split("."), path.split(".")
    return len(wanted) == len(given) and all(one in ("*", other) for one, other in zip(wanted, given, strict=True))
