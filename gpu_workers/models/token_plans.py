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
    stream, which must be known. With ``is_suffix``, the tensor has only the last ones of the stream, which must be
    known. ``item`` is the place of the tensors in a list or tuple, of which all else stays whole. ``after`` is a
    stream whose tokens come first in the tensor, if the call has it.
    """

    stream: str
    dim: int = 1
    ndim: int | None = None
    is_prefix: bool = False
    is_suffix: bool = False
    item: int | None = None
    after: str | None = None


@dataclass(frozen=True, slots=True)
class Length:
    """An integer: how many tokens a stream has, which a later tensor has too. Each rank is given its own number.

    Without a value, or with 0, the call does not have the stream.
    """

    stream: str


@dataclass(frozen=True, slots=True)
class Count:
    """An integer: how many of a stream's tokens, first or last ones, the class treats apart.

    Each rank is given how many of them it has. The stream must be known.
    """

    stream: str
    of_last: bool = False


Splits = Mapping[str | int, Split | Count | Length]
"""What is split of a submodule: arguments by name, results by number. A length comes before tensors with its tokens."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The tokens of the queries and of the keys of an attention: streams, in the order in which the class joins them.

    Without streams, every rank has all of them. A stream of several that a call does not have, such as that of an
    optional argument, has no tokens. ``others`` are further attentions that the same submodule computes
    after the first, each with its own declaration.

    ``may_skip``: the class may leave the attention out of a forward. ``mask_of_pairs``: from a mask of each token that
    a rank has, the class makes one of all pairs of them, which is true where both are. ``picks``: the class attends
    for each row of a batch alone, among those tokens of the streams that a mask picks: other numbers on each rank.

    ``repeats``: the class repeats every head of keys and values for a group of queries' heads, side by side; these are
    the attributes of the submodule of which the first divided by the second is how often. Ranks send each head once.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    others: tuple[Attention, ...] = ()
    may_skip: bool = False
    mask_of_pairs: bool = False
    picks: bool = False
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
class CachedTokens:
    """Tensors of a cache that hold tokens along ``dim``, of which each rank keeps its own.

    ``read`` is the name of the tokens among the keys of attentions, in a call that reads them. ``written`` are the
    streams whose tokens the class puts there, in place of others or after them.
    """

    read: str | None = None
    written: tuple[str, ...] = ()
    dim: int = 1


@dataclass(frozen=True, slots=True)
class CachedHeads:
    """Tensors of a cache that hold heads along ``dim``, of which each rank keeps those that it attends with.

    ``projection`` is the input of the plan's exchanges whose heads they are.
    """

    projection: str
    dim: int = 2


def never(_: Mapping[str, Any]) -> bool:
    """Return that no call does it: a test of ``Cache``."""
    return False


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values that calls keep: an object of the class, which each rank has with its own share of the tensors.

    ``argument`` names the argument of the forward, and ``tensors`` and ``counts`` attributes of the object, or of
    objects in it: its tensors, and integers that are the number of tokens of a stream. ``is_read`` and ``is_made`` are
    tests of all arguments of a call: whether it attends to tokens that are in the cache, and whether it returns a new
    one.
    """

    argument: str
    tensors: Mapping[str, CachedTokens | CachedHeads]
    is_read: Callable[[Mapping[str, Any]], bool] = never
    is_made: Callable[[Mapping[str, Any]], bool] = never
    counts: Mapping[str, str] = field(default_factory=dict)


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
    ``refused_backends``: backends of attention, by diffusers' names, with which the class attends in another way.
    ``cache``: the keys and values that calls of the class keep.
    """

    splits: Mapping[str, Splits]
    gathers: Mapping[str, Mapping[int, Split]]
    attentions: Mapping[str, Attention]
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    refused: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    refused_backends: tuple[str, ...] = ()
    cache: Cache | None = None
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
