"""``xditd adopt``: copy a lent component into the workers' own memory."""

from __future__ import annotations

import argparse

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.ipc.settings.client import AdoptFlags

SUMMARY = "copy a lent component into the workers' own memory"
DESCRIPTION = """\
Copy a lent component into the workers' own memory, so that it outlives the program that lent it. It is freed by
`xditd revoke`, and when the worker group ends."""
EXAMPLES = """\
examples:
  xditd status
  xditd adopt component-1-5f3a2c
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_component(parser)
    flags.add_settings(parser, AdoptFlags)


def run(parsed: argparse.Namespace) -> int:
    from xditd.client.client import Client

    with Client(parsed.runtime_dir, name="xditd adopt") as client:
        copied = client.adopt(parsed.component_id, deadline_s=parsed.deadline_s)
    if parsed.json:
        print(json_text({"component_id": parsed.component_id, "adopted": True, "copied_bytes": copied.total}))
    else:
        print(f"adopted {parsed.component_id}, {copied.total} bytes copied")
    return exits.DONE
