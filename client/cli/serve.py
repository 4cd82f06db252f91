"""``xditd serve``: become the daemon."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from xditd.client.subprograms import module_command, module_environment

SUMMARY = "run the daemon and its workers in the foreground"
DESCRIPTION = "Run the daemon in the foreground. Every flag is the daemon's: xditd serve --help lists them."
EXAMPLES = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take whatever the daemon takes."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(parsed: argparse.Namespace) -> int:
    return replace_process(parsed.arguments)


def replace_process(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by the daemon, so that signals and systemd reach it directly."""
    # Never imported: the command line is the client's only way into the daemon's room.
    command = module_command("xditd.daemon", arguments)
    os.execve(command[0], command, module_environment())  # noqa: S606 - no shell on purpose
