"""One valid instance of every message, built from the annotations, and invalid variants."""

from __future__ import annotations

import enum
import types
import typing
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from xditd.ipc.replies import AnyReply
from xditd.ipc.requests import AnyRequest
from xditd.ipc.worker_messages import AnyCommand, AnyReport

UNIONS: dict[str, Any] = {"request": AnyRequest, "reply": AnyReply, "command": AnyCommand, "report": AnyReport}


def classes(union: Any) -> list[type[msgspec.Struct]]:
    return list(get_args(union))


def sample(annotation: Any) -> Any:
    """Return a valid value of an annotated type, always the same; optional fields are set."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        inner, *metas = get_args(annotation)
        return _within(inner, metas[0])
    if origin in (typing.Union, types.UnionType):
        arms = [arm for arm in get_args(annotation) if arm is not type(None)]
        # Of arguments, a tensor: it has more to get wrong than a number.
        return sample(next((arm for arm in arms if isinstance(arm, type) and issubclass(arm, msgspec.Struct)), arms[0]))
    if origin is typing.Literal:
        return get_args(annotation)[-1]
    if origin is tuple:
        return (sample(get_args(annotation)[0]),)
    if origin is dict:
        key, value = get_args(annotation)
        return {sample(key): sample(value)}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return list(annotation)[-1]
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return instance(annotation)
    return {int: 3, float: 0.25, str: "text", bytes: b"bytes", bool: True}[annotation]


def instance(cls: type[msgspec.Struct], **changes: Any) -> Any:
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: sample(hints[field.name]) for field in msgspec.structs.fields(cls)}
    return cls(**(fields | changes))


def _within(inner: Any, meta: msgspec.Meta) -> Any:
    if inner is str:
        return "x" * max(meta.min_length or 0, 4)
    if inner is bytes:
        return bytes(range(meta.min_length or 4))
    return sample(inner)


def floats(annotation: Any, path: str, seen: set[Any] | None = None) -> typing.Iterator[tuple[str, Any]]:
    """Every float below an annotation, with the ``Meta`` that bounds it, or ``None``. Each struct is looked at once."""
    seen = set() if seen is None else seen
    origin = get_origin(annotation)
    if annotation is float:
        yield path, None
    elif origin is typing.Annotated:
        inner, meta = get_args(annotation)
        if inner is float:
            yield path, meta
        else:
            yield from floats(inner, path, seen)
    elif origin is not None:
        for arm in get_args(annotation):
            yield from floats(arm, path, seen)
    elif isinstance(annotation, type) and issubclass(annotation, msgspec.Struct) and annotation not in seen:
        seen.add(annotation)
        for name, hint in get_type_hints(annotation, include_extras=True).items():
            yield from floats(hint, f"{path}.{name}", seen)
