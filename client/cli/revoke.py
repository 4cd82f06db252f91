"""``xditd revoke``: end a loan, or free an adopted component."""

from __future__ import annotations

import argparse

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.ipc.settings.client import RevokeFlags

SUMMARY = "end a loan, or free an adopted component"
DESCRIPTION = """\
End a loan of any of your programs, or free an adopted component. Jobs that use it fail with lease_lost. Returns when no
worker maps it."""
EXAMPLES = """\
examples:
  xditd status
  xditd revoke component-1-5f3a2c
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_component(parser)
    flags.add_settings(parser, RevokeFlags)


def run(parsed: argparse.Namespace) -> int:
    from xditd.client.client import Client

    with Client(parsed.runtime_dir, name="xditd revoke") as client:
        client.revoke(parsed.component_id, deadline_s=parsed.deadline_s)
    if parsed.json:
        print(json_text({"component_id": parsed.component_id, "revoked": True}))
    else:
        print(f"revoked {parsed.component_id}")
    return exits.DONE
