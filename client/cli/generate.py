"""``xditd generate``: images and videos from words by a whole model, or from text embeddings by single files."""

from __future__ import annotations

import argparse

from xditd.client.cli import completion, control_flags, flags, generate_files, generate_prompt
from xditd.client.cli.generate_help import DESCRIPTION, EXAMPLES, SUMMARY
from xditd.ipc.settings.generation import GenerateFlags

__all__ = ["DESCRIPTION", "EXAMPLES", "SUMMARY", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to show")
    flags.add_settings(parser, GenerateFlags)
    control_flags.add_arguments(parser)
    for action in parser._actions:
        if action.dest == "model":
            action.completer = completion.models_and_files  # type: ignore[attr-defined]
    parser.set_defaults(refuse=parser.error)


def run(parsed: argparse.Namespace) -> int:
    if parsed.from_file is not None:
        from xditd.client.cli.repeating import apply_record

        apply_record(parsed)
    return generate_prompt.run(parsed) if generate_prompt.is_meant(parsed) else generate_files.run(parsed)
