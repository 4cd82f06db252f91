"""``xditd generate``: lend a transformer and a VAE file, and generate images."""

from __future__ import annotations

import argparse

from xditd.client.cli import control_flags, flags, generate_files
from xditd.client.cli.generate_files import describe_loan
from xditd.client.cli.generate_help import DESCRIPTION, EXAMPLES, SUMMARY
from xditd.ipc.settings.client import GenerateFlags

__all__ = ["DESCRIPTION", "EXAMPLES", "SUMMARY", "add_arguments", "describe_loan", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, GenerateFlags)
    control_flags.add_arguments(parser)
    parser.set_defaults(refuse=parser.error)


def run(parsed: argparse.Namespace) -> int:
    return generate_files.run(parsed)
