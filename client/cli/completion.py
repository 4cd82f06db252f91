"""``xditd completion``: print what lets a shell complete verbs, flags and files."""

from __future__ import annotations

import argparse
import os
from typing import Final

from xditd.client.cli import exits
from xditd.ipc.errors import XditdError

SUMMARY = "print completions for bash, zsh or fish"
DESCRIPTION = """\
Print the lines that let a shell complete verbs and flags of xditd, their words, names of models, ids of lent
components, and files."""
EXAMPLES = """\
examples:
  eval "$(xditd completion bash)"                                       for this shell; in ~/.bashrc for all
  eval "$(xditd completion zsh)"                                        in ~/.zshrc, after compinit
  xditd completion fish > ~/.config/fish/completions/xditd.fish
"""

ASKED: Final = "_ARGCOMPLETE"
"""The variable that is set while a shell asks for completions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")


def run(parsed: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["xditd"], shell=parsed.shell))
    return exits.DONE


def component_ids(parsed_args: argparse.Namespace, **_: object) -> tuple[str, ...]:
    """Return the ids of lent components, for a shell that completes one; none if no daemon answers."""
    from xditd.client.client import Client

    try:
        with Client(getattr(parsed_args, "runtime_dir", None), name="xditd completion") as client:
            return tuple(each.component_id for each in client.status().components)
    except XditdError:
        return ()


def models_and_files(prefix: str, **_: object) -> tuple[str, ...]:
    """Return the names of models, and the files and folders that begin so."""
    from argcomplete.completers import FilesCompleter

    from xditd.client import models_file

    return (*models_file.names(), *FilesCompleter()(prefix))


def answer(parser: argparse.ArgumentParser) -> None:
    """End this process with the completions that a shell asks for; return if none does."""
    if ASKED in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
