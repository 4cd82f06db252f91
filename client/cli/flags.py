"""Command line flags whose defaults come from environment variables, which their help names."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from xditd.client.cli import completion
from xditd.ipc import limits
from xditd.ipc.addresses import expand_home, user_path
from xditd.ipc.loras import MAX_SCALE
from xditd.ipc.settings.setting import Setting, settings_of
from xditd.ipc.suggestions import did_you_mean

JSON_VARIABLE = "XDITD_JSON"

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


def add_flag(
    parser: argparse.ArgumentParser,
    *names: str,
    variable: str,
    help: str,
    type: Callable[[str], Any] = str,
    default: Any = None,
    metavar: str | None = None,
    dest: str | None = None,
    choices: Sequence[str] = (),
) -> None:
    """Add a flag with a value. Its variable, unless empty, sets the default, which is checked like the flag.

    ``choices`` are what a shell completes; ``type`` accepts them.
    """
    shown = "" if default is None else f" (default: {default})"
    named: dict[str, Any] = {} if dest is None else {"dest": dest}
    action = parser.add_argument(
        *names,
        type=type,
        # argparse converts and checks a string default like a value on the command line.
        default=os.environ.get(variable) or default,
        metavar=metavar,
        **named,
        help=f"{help}{shown} [{variable}]",
    )
    complete(action, choices)


def complete(action: argparse.Action, choices: Sequence[str]) -> None:
    """Have a shell complete an argument with these words, unless there are none."""
    if choices:
        action.completer = lambda **_: choices  # type: ignore[attr-defined]


def add_named_values(
    parser: argparse.ArgumentParser,
    *names: str,
    variable: str,
    help: str,
    type: Callable[[str], dict[str, Any]],
    metavar: str,
) -> None:
    """Add a flag of ``NAME=VALUE`` that may be repeated: a dict, or ``None``. Its variable is the default."""
    parser.add_argument(
        *names,
        type=type,
        action=_Merge,
        default=os.environ.get(variable) or None,
        metavar=metavar,
        help=f"{help} [{variable}]",
    )


def add_paths(parser: argparse.ArgumentParser, setting: Setting) -> None:
    """Add a flag with a path that may be repeated: a list, or ``None``. Its variable has several, between colons."""
    given = os.environ.get(setting.variable) or ""
    parser.add_argument(
        *setting.flags,
        type=user_path,
        action=Append,
        default=[user_path(each) for each in given.split(os.pathsep) if each] or None,
        metavar=setting.metavar,
        dest=setting.name,
        help=f"{setting.help} [{setting.variable}]",
    )


class Append(argparse.Action):
    """Appends to a list; the first value replaces the default."""

    @staticmethod
    def items(values: Any) -> Sequence[Any]:
        """Return what one use of the flag adds."""
        return (values,)

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse passes it
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        found = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(found if found is not self.default and found else ()), *self.items(values)])


class Extend(Append):
    """Joins the lists of a flag that is given several times; the first one replaces the default."""

    @staticmethod
    def items(values: Any) -> Sequence[Any]:
        return values or ()


class _Merge(argparse.Action):
    """Merges the dicts of a flag that is given several times; the first one replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse passes it
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | dict[str, Any] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        assert isinstance(values, dict)
        found = getattr(namespace, self.dest)
        merged = dict(found) if isinstance(found, dict) else {}  # a string default is not converted yet
        for name, value in values.items():
            if name in merged:
                raise argparse.ArgumentError(self, _given_twice(name, merged[name], value))
            merged[name] = value
        setattr(namespace, self.dest, merged)


def is_on(variable: str) -> bool | None:
    """Parse a boolean variable; ``None`` if it is invalid."""
    text = os.environ.get(variable, "").strip().lower()
    return text in _TRUE if text in _TRUE + _FALSE else None


def add_switch(parser: argparse.ArgumentParser, *names: str, variable: str, help: str) -> None:
    """Add a flag without a value; its variable turns it on with 1, true, yes or on."""

    def convert(text: str) -> bool:
        raise argparse.ArgumentTypeError(f"{variable}={text!r}: use 1 or 0")

    default = is_on(variable)
    action = parser.add_argument(*names, action="store_true", default=default, help=f"{help} [{variable}]")
    if default is None:
        # argparse converts a string default only when this parser is used, so other verbs ignore the wrong value.
        action.default, action.type = os.environ[variable], convert


def add_settings(parser: argparse.ArgumentParser, struct: type[msgspec.Struct]) -> None:
    """Add a flag for each field of a verb's struct, in order."""
    for setting in settings_of(struct):
        if setting.default is False:
            add_switch(parser, *setting.flags, variable=setting.variable, help=setting.help)
        elif setting.kind == "paths":
            add_paths(parser, setting)
        elif setting.kind in _NAMED:
            convert, metavar = _NAMED[setting.kind]
            add_named_values(
                parser, *setting.flags, variable=setting.variable, help=setting.help, type=convert, metavar=metavar
            )
        else:
            add_flag(
                parser,
                *setting.flags,
                variable=setting.variable,
                type=_converter(setting),
                default=setting.default,
                metavar=setting.metavar,
                dest=setting.name,
                help=setting.help,
                choices=setting.choices,
            )


def _converter(setting: Setting) -> Callable[[str], Any]:
    if setting.kind == "path":
        return user_path
    if setting.kind == "target":
        return expand_home  # as a text: Path drops the slash at the end
    if setting.kind == "size":
        return size(setting.more.get("multiple", 1))
    if setting.choices:
        return one_of(*setting.choices)
    if setting.number is None:
        return str
    kind, low, high = setting.number
    return whole(low, high) if kind is int else number(low, high)


def one_of(*names: str) -> Callable[[str], str]:
    """Make an argparse type that accepts one of several words."""

    def convert(text: str) -> str:
        if text not in names:
            listed = f"{', '.join(names[:-1])} or {names[-1]}"
            raise argparse.ArgumentTypeError(f"{text!r}: use {listed}{did_you_mean(text, names)}")
        return text

    return convert


def named_values(text: str) -> dict[str, bool | int | float]:
    """Parse comma-separated ``NAME=VALUE`` items; values are numbers, ``true`` or ``false``."""
    found: dict[str, bool | int | float] = {}
    for each in text.split(","):
        name, _, word = (part.strip() for part in each.partition("="))
        value = _value(word)
        if not name or value is None:
            raise argparse.ArgumentTypeError(f"{each!r}: use NAME=VALUE with a finite number, true or false")
        if name in found:
            raise argparse.ArgumentTypeError(_given_twice(name, found[name], value))
        found[name] = value
    return found


def strengths(text: str) -> dict[str, float]:
    """Parse comma-separated ``FILE=STRENGTH`` or ``FILE:STRENGTH`` items; names may have ``=``, ``:`` and commas."""
    found: dict[str, float] = {}
    item = ""
    for part in text.split(","):
        item = f"{item},{part}" if item else part
        name, value = _strength(item)
        if value is None:
            continue  # a part of a name
        if not name or isinstance(value, bool) or abs(value) > MAX_SCALE:
            break
        if name in found:
            raise argparse.ArgumentTypeError(_given_twice(name, found[name], value))
        found[name] = value
        item = ""
    if item or not found:
        raise argparse.ArgumentTypeError(
            f"{item!r}: use FILE=STRENGTH, such as style.safetensors=0.8, with a number from {-MAX_SCALE:g} to "
            f"{MAX_SCALE:g}"
        )
    return found


def _strength(item: str) -> tuple[str, bool | int | float | None]:
    """Return the file and the number behind its last ``=`` or, if that has none, ``:``; else no number."""
    for mark in ("=", ":"):
        name, _, word = (each.strip() for each in item.rpartition(mark))
        value = _value(word)
        if value is not None:
            return name, value
    return item, None


_NAMED: Final = {"named values": (named_values, "NAME=VALUE"), "strengths": (strengths, "FILE=STRENGTH")}
"""Flags of names with values, by the kind of their setting: how they are read and shown."""


def _value(word: str) -> bool | int | float | None:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        whole_value = int(word)
    except ValueError:
        pass
    else:
        return whole_value if abs(whole_value) < 2**63 else None
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _given_twice(name: str, first: float, second: float) -> str:
    return f"{name} is given twice, as {first!r} and as {second!r}; leave one out"


def number(low: float, high: float) -> Callable[[str], float]:
    """Make an argparse type for numbers in [low, high]."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = high + 1.0
        if not low <= value <= high:  # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text!r}: use a number from {low:g} to {high:g}")
        return value

    return convert


def whole(low: int, high: int) -> Callable[[str], int]:
    """Make an argparse type for integers in [low, high]."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: use a whole number from {low} to {high}")
        return number

    return convert


def size(multiple: int = 1) -> Callable[[str], tuple[int, int]]:
    """Make an argparse type for WIDTHxHEIGHT in pixels, both divisible by ``multiple``."""

    def convert(text: str) -> tuple[int, int]:
        width, _, height = text.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r}: use WIDTHxHEIGHT in pixels, for example 1024x768")
        found = int(width), int(height)
        for side in found:
            if not 0 < side <= limits.MAX_SIDE_PIXELS or side % multiple:
                kind = f"multiples of {multiple} pixels, up to" if multiple > 1 else "from 1 pixel to"
                raise argparse.ArgumentTypeError(f"{text!r}: sides are {kind} {limits.MAX_SIDE_PIXELS}")
        return found

    return convert


def add_component(parser: argparse.ArgumentParser) -> None:
    """Add the argument for a component id."""
    action = parser.add_argument("component_id", metavar="COMPONENT_ID", help="as `xditd status` shows it")
    action.completer = completion.component_ids  # type: ignore[attr-defined]
