"""Token plans: what of a class's forward is a sequence of tokens, where ranks split it, and where they gather it.

A plan is data that a reader can check against the source of the class. Paths are those of submodules. A ``*`` stands
for any one name: ``transformer_blocks.*.attn`` is the attention of every block. A last name of ``-1`` is the last
submodule of a list. The empty path is the module itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final

from xditd.ipc.errors import Unsupported

PLANS: Final = "xditd.gpu_workers.plans"
"""The package of the plans, which this one does not import: they use the words of models."""

LAST: Final = "-1"
"""The last name of a path that is the last submodule of a list."""


class PlanFault(Unsupported):
    """A module or a call is not as its token plan declares; the message says what differs."""


@dataclass(frozen=True, slots=True)
class Split:
    """A tensor, or each tensor of a list, tuple or map, that holds a stream's tokens along ``dim``.

    ``stream`` is a name of the plan's own. A tensor with one entry along ``dim``, or with another number of dimensions
    than ``ndim`` (if given), stays whole. With ``is_prefix``, tokens that are this rank's already follow those of the
    stream, which must be known.
    """

    stream: str
    dim: int = 1
    ndim: int | None = None
    is_prefix: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """The tokens of the queries and of the keys of an attention: streams, in the order in which the class joins them.

    Without streams, every rank has all of them. A stream of several that a call does not have, such as that of an
    optional argument, has no tokens. ``others`` are further attentions that the same submodule computes
    after the first, each with its own declaration.

    ``repeats``: the class repeats every head of keys and values for a group of queries' heads, side by side; these are
    the attributes of the submodule of which the first divided by the second is how often. Ranks send each head once.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    others: tuple[Attention, ...] = ()
    repeats: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """An attention that the class computes in parts of one whole sequence, such as one with a mask of blocks.

    The projections ``inputs`` (submodules of the attention, each with the attribute of the attention that is its number
    of heads) give this rank's tokens. Ranks exchange them for all tokens of a share of the heads, which the class's own
    code attends from, and back before the projection ``output``. Where heads cannot be shared, every rank gathers all.
    """

    stream: str
    inputs: Mapping[str, str]
    output: str


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """The token plan of one class.

    ``splits``: by path, the arguments of a submodule (by name), or its results (by number), that ranks split.
    ``gathers``: by path, the results of a submodule (by number) that ranks gather.
    ``attentions``: by path, every submodule that computes attention over tokens.
    ``exchanges``: by path, submodules with attention for which ranks exchange tokens for heads.
    ``whole``: paths of submodules with attention that no rank splits, such as refiners of a text.
    ``optional``: paths among all of these that not every configuration of the class has.
    ``refused``: arguments of the class's forward, each with a test of the values that the plan does not cover.
    """

    splits: Mapping[str, Mapping[str | int, Split]]
    gathers: Mapping[str, Mapping[int, Split]]
    attentions: Mapping[str, Attention]
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    refused: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    streams: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        found = {each.stream for splits in self.splits.values() for each in splits.values()}
        object.__setattr__(self, "streams", frozenset(found))


def is_given(value: object) -> bool:
    """Return whether an argument has a value: a test of ``TokenPlan.refused``."""
    return value is not None


def find_plan(class_name: str) -> TokenPlan | str:
    """Return the plan of a class of diffusers, or the reason why it has none."""
    found: TokenPlan | str = import_module(PLANS).find(class_name)
    return found


def matches(pattern: str, path: str) -> bool:
    """Return whether a path is one that a pattern names."""
    wanted, given = pattern.split("."), path.split(".")
    return len(wanted) == len(given) and all(
        one == other or (one == "*" and other != LAST) for one, other in zip(wanted, given, strict=True)
    )
