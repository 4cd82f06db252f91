"""A command line that says which flag or variable was likely meant; of the daemon, and of ``xditd``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from xditd.ipc.settings.daemon import CONFIG_VARIABLE, SETTINGS
from xditd.ipc.settings.setting import PREFIX
from xditd.ipc.suggestions import did_you_mean


def known_variables() -> frozenset[str]:
    """List every environment variable that some part of xditd reads."""
    # Imported here: a daemon that starts without a variable needs no flags of other verbs.
    from xditd.ipc.settings.client import variables

    return frozenset({CONFIG_VARIABLE, *(each.variable for each in SETTINGS if each.variable)}) | variables()


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Make a sentence for each variable with our prefix that nothing reads."""
    named = sorted(name for name in environ if name.startswith(PREFIX))
    known = known_variables() if named else frozenset()
    return [
        f"environment variable {name}: nothing reads it{did_you_mean(name, known)}"
        for name in named
        if name not in known
    ]


class Parser(argparse.ArgumentParser):
    """A parser, also of a verb, that refuses what it does not know by itself, and names what is close to it."""

    def __init__(self, **options: Any) -> None:
        self.flags: list[str] = []
        super().__init__(**options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument, as argparse does."""
        action = super().add_argument(*names, **options)
        self.flags += action.option_strings
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and end with a misuse error where something is left over."""
        parsed, extra = super().parse_known_args(args, namespace)
        if extra:
            hints = (did_you_mean(word.partition("=")[0], self.flags) for word in extra if word.startswith("-"))
            self.error(f"unrecognized arguments: {' '.join(extra)}{next(filter(None, hints), '')}")
        return parsed, []
