"""Read the sizes of a model from the shapes of a checkpoint's tensors. Errors begin with the family's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from xditd.gpu_workers.models.entries import Shape
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.name_lists import listed


def count_blocks(family: str, shapes: Mapping[str, Shape], blocks: str, limit: int) -> int:
    """Count the blocks whose tensors are named ``<blocks>.<number>.``: the highest number plus one.

    Raises:
        BadCheckpoint: there are more than ``limit``.
    """
    named = (name.removeprefix(f"{blocks}.").partition(".")[0] for name in shapes if name.startswith(f"{blocks}."))
    highest = max((int(number) for number in named if number.isdecimal()), default=-1)
    if highest >= limit:
        raise BadCheckpoint(f"{family}: {blocks}.{highest} exceeds the limit of {limit} blocks")
    return highest + 1


def matrix(family: str, shapes: Mapping[str, Shape], name: str) -> tuple[int, int]:
    """Return rows and columns of a tensor.

    Raises:
        BadCheckpoint: it is missing, or no matrix.
    """
    shape = shapes.get(name, ())
    if len(shape) != 2 or 0 in shape:
        found = f"is {list(shape)}, not a matrix" if shape else "is missing"
        raise BadCheckpoint(f"{family}: {name} {found}: the size of the model cannot be read")
    return shape[0], shape[1]


def vote(
    family: str,
    what: str,
    shapes: Mapping[str, Shape],
    candidates: Iterable[tuple[str, int]],
    default: int | None = None,
) -> int:
    """Return the most common size among ``candidates``: names of tensors, each with a dimension.

    So one misshapen tensor does not decide the size, and the check of all shapes names it. ``default`` is returned if
    no candidate has a size.

    Raises:
        BadCheckpoint: no candidate has a size, and there is no default.
    """
    asked = list(candidates)
    sides = ((shapes.get(name, ()), dimension) for name, dimension in asked)
    votes = Counter(shape[dimension] for shape, dimension in sides if len(shape) > dimension and shape[dimension])
    if votes:
        return votes.most_common(1)[0][0]
    if default is None:
        lacking = listed([name for name, _ in asked])
        raise BadCheckpoint(
            f"{family}: {what} cannot be read from any tensor: the file lacks {lacking}; lend a whole file of one model"
        )
    return default
