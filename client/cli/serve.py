"""``xditd serve``: replace this process by the daemon."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from xditd.client.cli import completion, flags
from xditd.client.subprograms import module_command, module_environment
from xditd.ipc.settings.daemon import SETTINGS

SUMMARY = "run the daemon and its workers in the foreground"
DESCRIPTION = "Run the daemon in the foreground. xditd serve --help lists its flags."
EXAMPLES = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pass all arguments on to the daemon; for completions, have its flags."""
    if completion.ASKED in os.environ:
        parser.add_argument("--config", metavar="FILE")
        for setting in filter(lambda each: each.flag, SETTINGS):
            flags.complete(parser.add_argument(setting.flag, dest=setting.name), setting.choices)
        return
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(parsed: argparse.Namespace) -> int:
    return replace_process(parsed.arguments)


def replace_process(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by the daemon, so that signals and systemd reach it directly."""
    # The client does not import the daemon; it only starts its command line.
    command = module_command("xditd.daemon", arguments)
    os.execve(command[0], command, module_environment())  # noqa: S606 - no shell on purpose
