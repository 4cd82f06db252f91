"""Flags whose defaults come from environment variables, and say so in their help."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xditd.ipc import limits
from xditd.ipc.addresses import RUNTIME_DIR_VARIABLE

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
) -> None:
    """Add a flag with a value. Its variable gives the default, and passes the same checks as the flag."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(
        *names,
        type=type,
        # argparse converts a default that is text as if it had been typed, and reports what is wrong with it.
        default=os.environ.get(variable, default),
        metavar=metavar,
        **({} if dest is None else {"dest": dest}),
        help=f"{help}{shown} [{variable}]",
    )


def add_switch(parser: argparse.ArgumentParser, *names: str, variable: str, help: str) -> None:
    """Add a flag without a value; its variable turns it on by 1, true, yes or on."""
    text = os.environ.get(variable, "").strip().lower()
    if text not in _TRUE + _FALSE:
        parser.error(f"{variable}={text!r}: use 1 or 0")
    parser.add_argument(*names, action="store_true", default=text in _TRUE, help=f"{help} [{variable}]")


def add_runtime_dir(parser: argparse.ArgumentParser) -> None:
    add_flag(
        parser,
        "--runtime-dir",
        variable=RUNTIME_DIR_VARIABLE,
        type=Path,
        metavar="DIR",
        help="folder of the daemon's sockets (default: $XDG_RUNTIME_DIR/xditd, or /tmp/xditd-<uid>)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    add_switch(parser, "--json", variable="XDITD_JSON", help="print JSON on stdout, for programs")


def add_log_level(parser: argparse.ArgumentParser, default: str) -> None:
    add_flag(
        parser,
        "--log-level",
        variable="XDITD_LOG_LEVEL",
        type=log_level,
        default=default,
        metavar="LEVEL",
        help="debug, info, warning or error: what is logged on stderr",
    )


def log_level(text: str) -> str:
    if text not in ("debug", "info", "warning", "error"):
        raise argparse.ArgumentTypeError(f"{text!r}: use debug, info, warning or error")
    return text


def whole(low: int, high: int) -> Callable[[str], int]:
    """Make a type for whole numbers in [low, high]."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: use a whole number from {low} to {high}")
        return number

    return convert


def size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT in pixels."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: use WIDTHxHEIGHT in pixels, for example 1024x768")
    found = int(width), int(height)
    for side in found:
        if not 0 < side <= limits.MAX_SIDE_PIXELS or side % limits.SIDE_MULTIPLE_PIXELS:
            raise argparse.ArgumentTypeError(
                f"{text!r}: sides are multiples of {limits.SIDE_MULTIPLE_PIXELS} pixels, up to {limits.MAX_SIDE_PIXELS}"
            )
    return found


def add_component(parser: argparse.ArgumentParser, *, deadline_variable: str) -> None:
    """Take one component by its id, and how long to wait for what is done to it."""
    parser.add_argument("component_id", metavar="COMPONENT_ID", help="as `xditd status` shows it")
    add_flag(
        parser,
        "--deadline-s",
        variable=deadline_variable,
        type=whole(1, 86_400),
        default=300,
        metavar="SECONDS",
        help="how long to wait for it",
    )
