"""Argument trees: the arguments and results of a model's ``forward`` in messages.

A tree has numbers, booleans, texts, ``None``, lists, tuples, maps with text keys, and tensors, each with its dtype, its
shape and the place of its values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from xditd.ipc import limits
from xditd.ipc.tensors import Bytes, Described, DType, IoTensor, Name, Shape

MAX_FLOAT: Final = 1.7976931348623157e308
Finite = Annotated[float, msgspec.Meta(ge=-MAX_FLOAT, le=MAX_FLOAT)]
"""No infinity, and no NaN."""
Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Word = Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]


class Values(Described, frozen=True, kw_only=True, tag_field="leaf", tag="values"):
    """A small tensor whose elements are in the message, in row-major order: no GPU has to be read or waited for."""

    dtype: DType
    shape: Shape
    values: Annotated[tuple[bool | Whole | Finite, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENT_VALUES)]


class InIo(Described, frozen=True, kw_only=True, tag_field="leaf", tag="io"):
    """A contiguous tensor in the I/O block of the job.

    With a ``kept_id`` the workers keep it for the client under this id, in place of an earlier one.
    """

    offset_bytes: Bytes
    dtype: DType
    shape: Shape
    kept_id: Name | None = None

    @property
    def place(self) -> IoTensor:
        return IoTensor(offset_bytes=self.offset_bytes, dtype=self.dtype, shape=self.shape)


class Kept(Described, frozen=True, kw_only=True, tag_field="leaf", tag="kept"):
    """A tensor that the workers keep for this client. Its dtype and device address are the same in every call.

    If the workers do not have it (any more), the job fails with ``UnknownKept``: the client sends the tensor again.
    """

    kept_id: Name
    dtype: DType
    shape: Shape


class Repeated(Described, frozen=True, kw_only=True):
    """A tensor with each row of dimension 0 repeated ``times`` times, as by ``torch.repeat_interleave``."""

    tensor: Values | InIo | Kept
    times: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_BATCH)] = 1


class Rows(Described, frozen=True, kw_only=True, tag_field="leaf", tag="rows"):
    """Tensors concatenated along dimension 0."""

    parts: Annotated[tuple[Repeated, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_BATCH)]


class ListOf(Described, frozen=True, kw_only=True, tag_field="leaf", tag="list"):
    """A list of arguments."""

    items: Annotated[tuple[Argument, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]


class TupleOf(Described, frozen=True, kw_only=True, tag_field="leaf", tag="tuple"):
    """A tuple of arguments."""

    items: Annotated[tuple[Argument, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]


class MapOf(Described, frozen=True, kw_only=True, tag_field="leaf", tag="map"):
    """A map from text keys to arguments."""

    items: Annotated[dict[Word, Argument], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]


Tensor = Values | InIo | Kept | Rows
Argument = None | bool | Whole | Finite | Word | Values | InIo | Kept | Rows | ListOf | TupleOf | MapOf
Arguments = Annotated[dict[Name, Argument], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]
"""Arguments by their names in the signature."""


def walk(arguments: dict[str, Argument]) -> Iterator[tuple[str, Argument]]:
    """Yield every node of a tree, from the top, with its path such as ``cap_feats[1]``.

    Raises:
        ValueError: the tree has more nodes or levels than the limits allow; the message names the limit.
    """
    count = 0
    pending: list[tuple[str, Argument, int]] = [(name, each, 1) for name, each in reversed(arguments.items())]
    while pending:
        path, node, depth = pending.pop()
        count += 1
        if count > limits.MAX_ARGUMENTS:
            raise ValueError(f"more than {limits.MAX_ARGUMENTS} arguments in one tree")
        if depth > limits.MAX_ARGUMENT_DEPTH:
            raise ValueError(f"{path} is nested deeper than {limits.MAX_ARGUMENT_DEPTH} levels")
        yield path, node
        if isinstance(node, (ListOf, TupleOf)):
            children = [(f"{path}[{number}]", each) for number, each in enumerate(node.items)]
        elif isinstance(node, MapOf):
            children = [(f"{path}.{key}", each) for key, each in node.items.items()]
        else:
            continue
        pending += [(name, each, depth + 1) for name, each in reversed(children)]


def tensors(arguments: dict[str, Argument]) -> Iterator[tuple[str, Values | InIo | Kept]]:
    """Yield every tensor of a tree, also those inside ``Rows``, with its path.

    Raises:
        ValueError: see :func:`walk`.
    """
    for path, node in walk(arguments):
        if isinstance(node, (Values, InIo, Kept)):
            yield path, node
        elif isinstance(node, Rows):
            for number, part in enumerate(node.parts):
                yield f"{path}.rows[{number}]", part.tensor
