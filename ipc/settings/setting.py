"""A setting: its flag, environment variable, file key, bounds and help, read from a field of a settings struct."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import msgspec

from xditd.ipc.errors import BadRequest
from xditd.ipc.suggestions import did_you_mean

PREFIX: Final = "XDITD_"
"""All environment variables of xditd begin with it."""


def about(help: str, **more: Any) -> msgspec.Meta:
    """Describe a field: its help text, and those of the following that differ from what its name and type imply.

    ``section`` and ``key``: its place in the file. ``flag`` and ``variable``: "" if it has none. ``short``: the flag of
    one letter. ``metavar``: the name of the flag's value. ``kind`` of a text: "path", "paths" (a flag that may be
    repeated), "target" (a path whose slash at the end counts), "size" (in pixels, divisible by ``multiple``), "named
    values", or "strengths" by file. ``values``: the allowed values in words. ``check`` raises
    ``ValueError`` for values that the type allows but the setting does not. ``default``: the default in words.
    ``reload``: a reload applies it.
    """
    return msgspec.Meta(description=help, extra=more)


@dataclass(frozen=True)
class Setting:
    """One field of a settings struct. ``flag``, ``variable`` and ``section`` are empty if it has none."""

    name: str
    type: Any
    default: Any
    help: str
    more: Mapping[str, Any]

    @property
    def section(self) -> str:
        return str(self.more.get("section", ""))

    @property
    def key(self) -> str:
        return str(self.more.get("key", self.name))

    @property
    def flag(self) -> str:
        return str(self.more.get("flag", "--" + self.name.replace("_", "-")))

    @property
    def variable(self) -> str:
        return str(self.more.get("variable", PREFIX + self.name.upper()))

    @property
    def metavar(self) -> str:
        usual = {
            "path": "DIR" if self.name.endswith("dir") else "FILE",
            "paths": "FILE",
            "target": "PATH",
            "size": "WIDTHxHEIGHT",
        }.get(self.kind)
        return str(self.more.get("metavar") or usual or self.key.rpartition("_")[2].upper())

    @property
    def kind(self) -> str:
        """The meaning of a text: "path", "paths", "target", "size", "named values", "strengths", or empty."""
        return str(self.more.get("kind", ""))

    @property
    def flags(self) -> tuple[str, ...]:
        """Every spelling of the flag."""
        return tuple(filter(None, (self.more.get("short"), self.flag)))

    @property
    def number(self) -> tuple[type, Any, Any] | None:
        """``int`` or ``float``, and the least and greatest value; ``None`` for other types."""
        for part in _union_members(self.type):
            if _strip_annotated(part) in (int, float):
                return _strip_annotated(part), bound(part, "ge", "gt"), bound(part, "le")
        return None

    @property
    def is_reloaded(self) -> bool:
        return bool(self.more.get("reload", False))

    @property
    def shown_default(self) -> str:
        """The default for help and documents; empty if there is none."""
        if "default" in self.more:
            return str(self.more["default"])
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return "" if self.default is None else str(self.default)

    @property
    def values(self) -> str:
        """The allowed values in words, for documents and error messages."""
        return str(self.more.get("values") or _values(self.type))

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, if only certain words are allowed."""
        types = [_strip_annotated(each) for each in _union_members(self.type) if each is not type(None)]
        return get_args(types[0]) if len(types) == 1 and get_origin(types[0]) is Literal else ()

    def read(self, value: object, source: str) -> Any:
        """Convert the value of a flag, a variable or a file key, which errors call ``source``.

        Raises:
            BadRequest: the value is invalid; the message names source, value and remedy.
        """
        try:
            found = msgspec.convert(self._number(value), type=self.type)
            self.more.get("check", bool)(found)
        except (msgspec.ValidationError, ValueError):
            hint = did_you_mean(value, self.choices) if isinstance(value, str) else ""
            raise BadRequest(f"{source} = {value!r}: use {self.values}{hint}") from None
        return found

    def _number(self, value: object) -> object:
        """Convert text to a number if the setting takes one and the text is one."""
        if isinstance(value, str) and self.number is not None:
            with contextlib.suppress(ValueError):
                return self.number[0](value)
        return value


def settings_of(struct: type[msgspec.Struct]) -> tuple[Setting, ...]:
    """List the settings of a struct, in the order of its fields."""
    found = []
    for field in msgspec.structs.fields(struct):
        meta = _metas(field.type)[-1]
        default = field.default
        if default is msgspec.NODEFAULT:
            factory = field.default_factory
            default = None if factory is msgspec.NODEFAULT else factory()
        found.append(Setting(field.name, field.type, default, meta.description or "", meta.extra or {}))
    return tuple(found)


def bound(type_: Any, *names: str) -> Any:
    """Find a bound of an annotated type by its names (``ge``, ``gt``, ``le``); ``None`` without one."""
    found = (getattr(meta, name) for meta in _metas(type_) for name in names)
    return next((value for value in found if value is not None), None)


def _metas(type_: Any) -> list[msgspec.Meta]:
    return [each for each in getattr(type_, "__metadata__", ()) if isinstance(each, msgspec.Meta)]


def _strip_annotated(type_: Any) -> Any:
    return get_args(type_)[0] if get_origin(type_) is Annotated else type_


def _union_members(type_: Any) -> tuple[Any, ...]:
    """Return the members of a union, else the type itself."""
    bare = _strip_annotated(type_)
    return get_args(bare) if get_origin(bare) in (Union, UnionType) else (type_,)


def _values(type_: Any) -> str:
    words = []
    for part in _union_members(type_):
        bare = _strip_annotated(part)
        low, high = bound(part, "ge", "gt"), bound(part, "le")
        if get_origin(bare) is Literal:
            names = [f'"{name}"' for name in get_args(bare)]
            words.append(names[0] if len(names) == 1 else f"one of {', '.join(names)}")
        elif bare is int:
            words.append(f"a whole number from {low} to {high}")
        elif bare is float:
            is_open = bound(part, "gt") is not None
            words.append(f"seconds above {low:g}, at most {high:g}" if is_open else f"seconds from {low:g} to {high:g}")
    return " or ".join(words)
