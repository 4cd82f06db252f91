"""Argument trees: the arguments and results of a model's ``forward``, and the attributes of modules, in messages.

A tree has numbers, booleans, texts, ``None``, lists, tuples, maps, objects of diffusers and transformers, and tensors,
each with its dtype, its shape and the place of its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.field_types import Bytes, Described, DType, Name, Shape
from xditd.ipc.tensors import IoTensor

MAX_FLOAT: Final = 1.7976931348623157e308
Finite = Annotated[float, msgspec.Meta(ge=-MAX_FLOAT, le=MAX_FLOAT)]
"""No infinity, and no NaN."""
Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Word = Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]


class Values(Described, frozen=True, kw_only=True, tag_field="leaf", tag="values"):
    """A small tensor whose elements are in the message, in row-major order: no GPU has to be read or waited for."""

    dtype: DType
    shape: Shape
    on_host: bool = False
    """Whether the tensor stays on the CPU, for a module on a GPU."""
    values: Annotated[tuple[bool | Whole | Finite, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENT_VALUES)]


class InIo(Described, frozen=True, kw_only=True, tag_field="leaf", tag="io"):
    """A contiguous tensor in the I/O block of the job, or with ``in_device_io`` in its block of device memory.

    With a ``kept_id`` the workers keep it for the client under this id, in place of an earlier one. With an ``order``
    the tensor is ``permute(order)`` of what is in the block: its memory has another order of dimensions than its shape.
    """

    offset_bytes: Bytes
    dtype: DType
    shape: Shape
    kept_id: Name | None = None
    order: tuple[Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_RANK)], ...] | None = None
    on_host: bool = False
    """Whether the tensor stays on the CPU, for a module on a GPU."""
    in_device_io: bool = False

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


class PairsOf(Described, frozen=True, kw_only=True, tag_field="leaf", tag="pairs"):
    """A map whose keys are not all texts, as pairs of a key and a value."""

    items: Annotated[tuple[tuple[Argument, Argument], ...], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]


class SetOf(Described, frozen=True, kw_only=True, tag_field="leaf", tag="set"):
    """A set of plain values, sorted by their texts."""

    items: Annotated[tuple[Argument, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]


class Special(Described, frozen=True, kw_only=True, tag_field="leaf", tag="float"):
    """A number that is not finite, such as the fill value of a mask."""

    value: Literal["inf", "-inf", "nan"]


class Named(Described, frozen=True, kw_only=True, tag_field="leaf", tag="name"):
    """A dtype of torch (``torch.bfloat16``), a kind of device (``device:cuda``), a submodule (``submodule:path``), a
    member of an enumeration (``module:Class.MEMBER``), or a class (``class:module:Class``)."""

    name: Name


class ObjectOf(Described, frozen=True, kw_only=True, tag_field="leaf", tag="object"):
    """An object with its attributes, such as a KV cache or an attention processor.

    ``class_name`` is ``module:Class``. Workers make objects only of the packages in
    :data:`~xditd.ipc.module_state.PACKAGES`.
    """

    class_name: Name
    attributes: Annotated[dict[Name, Argument], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]


class OutputOf(Described, frozen=True, kw_only=True, tag_field="leaf", tag="output"):
    """A result: an output class of diffusers or transformers, and those of its fields that are set."""

    class_name: Name
    items: Annotated[dict[Name, Argument], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]


class Held(Described, frozen=True, kw_only=True, tag_field="leaf", tag="held"):
    """A tensor that a forward made for an object (a KV cache), and that stays in the workers until it is released.

    In the state of an argument after a call, an empty ``held_id`` is the tensor that the client has there already.
    """

    held_id: Annotated[str, msgspec.Meta(max_length=64)]
    dtype: DType
    shape: Shape


class Given(Described, frozen=True, kw_only=True, tag_field="leaf", tag="given"):
    """A result that is one of the values among the arguments of the call: the caller has it already.

    ``path`` has its number among the inner values (:func:`inner_values`) of each level below argument ``name``.
    """

    part: Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_PARTS)]
    name: Name
    path: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_ARGUMENTS)], ...],
        msgspec.Meta(max_length=limits.MAX_ARGUMENT_DEPTH),
    ] = ()


class LentTensor(Described, frozen=True, kw_only=True, tag_field="leaf", tag="lent"):
    """A tensor among a module's attributes, by its name in the manifest."""

    name: Name


class Opaque(Described, frozen=True, kw_only=True, tag_field="leaf", tag="opaque"):
    """A value that cannot be sent; ``text`` says what it is. Workers refuse a module with one that theirs lacks."""

    text: Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]


Tensor = Values | InIo | Kept | Rows
Argument = (
    None
    | bool
    | Whole
    | Finite
    | Word
    | Values
    | InIo
    | Kept
    | Rows
    | ListOf
    | TupleOf
    | MapOf
    | PairsOf
    | SetOf
    | Special
    | Named
    | ObjectOf
    | OutputOf
    | Held
    | Given
    | LentTensor
    | Opaque
)
Arguments = Annotated[dict[Name, Argument], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]
"""Arguments by their names in the signature."""
ChangedArguments = Annotated[tuple[Arguments, ...], msgspec.Meta(max_length=limits.MAX_PARTS)]
"""For each part of a call, the arguments that the forward may have changed."""


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
        pending += [(name, each, depth + 1) for name, each in reversed(list(children(path, node)))]


def children(path: str, node: Argument) -> Iterator[tuple[str, Argument]]:
    """Yield what a node holds, each with its path."""
    if isinstance(node, (ListOf, TupleOf, SetOf)):
        yield from ((f"{path}[{number}]", each) for number, each in enumerate(node.items))
    elif isinstance(node, (MapOf, OutputOf)):
        yield from ((f"{path}.{key}", each) for key, each in node.items.items())
    elif isinstance(node, ObjectOf):
        yield from ((f"{path}.{key}", each) for key, each in node.attributes.items())
    elif isinstance(node, PairsOf):
        yield from ((f"{path}[{key!r}]", each) for key, each in node.items)


def inner_values(value: Any) -> list[Any]:
    """Return what a value holds, such as the attributes of an object, in the order of :func:`children` of its node."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else list(getattr(value, "__dict__", {}).values())


def given_value(node: Given, parts: Sequence[Mapping[str, Any]]) -> Any:
    """Return what ``node`` names, from the arguments of each part.

    Raises:
        LookupError: there is no such value.
    """
    value = parts[node.part][node.name]
    for number in node.path:
        value = inner_values(value)[number]
    return value


def depth_of(node: Argument) -> int:
    """Return the number of levels of a tree. It may be deeper than Python's stack."""
    depth, level = 0, [node]
    while level:
        depth += 1
        level = [inner for each in level for _, inner in children("", each)]
    return depth


def holds(node: Argument, kind: type) -> bool:
    """Return whether a tree has a node of this kind."""
    return isinstance(node, kind) or any(holds(each, kind) for _, each in children("", node))


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
