"""Command line parser of ``xditd`` and the daemon, which suggests the closest flag or variable for an unknown one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from xditd.ipc.settings.daemon import CONFIG_VARIABLE, SETTINGS
from xditd.ipc.settings.setting import PREFIX
from xditd.ipc.suggestions import did_you_mean

_REQUIRED: Final = "the following arguments are required"
"""How argparse begins its message about arguments that are missing."""


def known_variables() -> frozenset[str]:
    """List every environment variable that xditd reads."""
    # Imported here to start faster: most daemons start without a variable.
    from xditd.ipc.settings.client import variables

    return frozenset({CONFIG_VARIABLE, *(each.variable for each in SETTINGS if each.variable)}) | variables()


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable with the prefix ``XDITD_`` that nothing reads."""
    named = sorted(name for name in environ if name.startswith(PREFIX))
    known = known_variables() if named else frozenset()
    return [
        f"environment variable {name}: nothing reads it{did_you_mean(name, known)}"
        for name in named
        if name not in known
    ]


class Parser(argparse.ArgumentParser):
    """An argument parser, also for verbs, that refuses an unknown flag with a suggestion, and prints no usage."""

    def __init__(self, **options: Any) -> None:
        self.flags: list[str] = []
        self._given: list[str] = []
        super().__init__(**options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument, as argparse does."""
        action = super().add_argument(*names, **options)
        self.flags += action.option_strings
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and exit with an error if unknown arguments are left."""
        self._given = [] if args is None else list(args)
        parsed, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(self._unrecognized(extra))
        return parsed, []

    def _unrecognized(self, extra: Sequence[str]) -> str:
        hints = (did_you_mean(word.partition("=")[0], self.flags) for word in extra if word.startswith("-"))
        return f"unrecognized arguments: {' '.join(extra)}{next(filter(None, hints), '')}"

    def error(self, message: str) -> NoReturn:
        """Print the message, and where to read on, to stderr; exit with status 2."""
        if message.startswith(_REQUIRED):  # argparse looks for these first, and a misspelt flag may be the reason
            unknown = [
                word for word in self._given if word.startswith("--") and word.partition("=")[0] not in self.flags
            ]
            message += f"; {self._unrecognized(unknown)}" if unknown else ""
        self.exit(2, f"{self.prog}: error: {message}\ntry '{self.prog} --help'\n")
