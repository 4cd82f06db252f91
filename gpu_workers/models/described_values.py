"""Make values from their descriptions: attributes of modules, and arguments that only modules run as their class take.

Objects are made from their attributes, without their constructors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch

from xditd.gpu_workers.models.configured_classes import HERE
from xditd.ipc.arguments import (
    Argument,
    LentTensor,
    ListOf,
    MapOf,
    Named,
    ObjectOf,
    PairsOf,
    SetOf,
    Special,
    TupleOf,
)
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.module_state import DEVICE, GENERATOR, STATE
from xditd.ipc.transports.module_classes import find_class, find_named

_SUBMODULE: Final = "submodule:"


def make_value(node: Argument, top: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, on_host: bool) -> Any:
    """Make the value of an attribute of a submodule of ``top``.

    Its tensors are copies of ``tensors``, on the CPU with ``on_host``; one that is not among them is empty, on meta.

    Raises:
        Unsupported: a class or an enumeration that is not installed here.
        BadRequest: not the value of an attribute, or a submodule that ``top`` does not have.
    """
    if isinstance(node, LentTensor):
        tensor = tensors.get(node.name)
        if tensor is None:
            return torch.empty(0, device="meta")
        # A copy: forwards keep views of such tables in caches of their own, and lent memory with views stays mapped.
        return tensor.to("cpu" if on_host else tensor.device, copy=True)
    make = partial(make_value, top=top, tensors=tensors, on_host=on_host)
    if isinstance(node, (ListOf, TupleOf)):
        items = map(make, node.items)
        return list(items) if isinstance(node, ListOf) else tuple(items)
    if isinstance(node, SetOf):
        return set(map(make_key, node.items))
    if isinstance(node, MapOf):
        return {key: make(each) for key, each in node.items.items()}
    if isinstance(node, PairsOf):
        return {make_key(key): make(each) for key, each in node.items}
    if isinstance(node, Named) and node.name.startswith(_SUBMODULE):
        try:
            return top.get_submodule(node.name.removeprefix(_SUBMODULE))
        except AttributeError as error:
            raise BadRequest(f"{node.name}: the module has none of this path") from error
    if isinstance(node, ObjectOf):
        return make_object(node.class_name, {key: make(each) for key, each in node.attributes.items()})
    return make_plain(node)


def make_key(node: Argument) -> Any:
    """Make a key of a map or a member of a set: a plain value, or a tuple of them.

    Raises:
        Unsupported, BadRequest: as for :func:`make_plain`.
    """
    return tuple(map(make_key, node.items)) if isinstance(node, TupleOf) else make_plain(node)


def make_plain(node: Argument) -> Any:
    """Make a value that holds no other.

    Raises:
        Unsupported: an enumeration that is not installed here.
        BadRequest: not such a value.
    """
    if isinstance(node, Special):
        return float(node.value)
    if isinstance(node, Named):
        return find_named(node.name, HERE)
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise BadRequest(f"a {type(node).__name__} has no value here")


def make_object(name: str, attributes: Mapping[str, Any]) -> Any:
    """Make an object of a class without running its constructor.

    Raises:
        Unsupported: the class is not installed here, or its objects have more than attributes.
    """
    if name == GENERATOR:
        return _make_generator(attributes)
    kind = find_class(name, HERE)
    if (
        issubclass(kind, (torch.nn.Module, torch.Tensor, type))
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or hasattr(kind, "__del__")
    ):
        raise Unsupported(f"class {name}: its objects cannot be made from attributes")
    try:
        made = object.__new__(kind)
        vars(made).update(attributes)
    except TypeError as error:  # an abstract class, one in C, or one without a __dict__
        raise Unsupported(f"class {name}: its objects cannot be made from attributes: {error}") from error
    return made


def _make_generator(attributes: Mapping[str, Any]) -> torch.Generator:
    """Make a random number generator in a given state.

    Raises:
        BadRequest: no valid state, or that of a generator of a GPU for workers without one.
    """
    device, state = attributes.get(DEVICE), attributes.get(STATE)
    try:
        generator = torch.Generator(device)
        generator.set_state(state.cpu() if isinstance(state, torch.Tensor) else torch.empty(0))
    except (RuntimeError, TypeError) as error:
        raise BadRequest(
            f"generator: workers cannot make one for {device!r} in the given state: {error!s:.200}"
        ) from error
    return generator
