"""``xditd status``: show the state of the daemon, its workers, the lent components and the queue."""

from __future__ import annotations

import argparse

import msgspec

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text, print_error
from xditd.client.cli.status_text import describe
from xditd.client.cli.watching import watch
from xditd.ipc.errors import BadRequest
from xditd.ipc.settings.client import StatusFlags
from xditd.ipc.status import DaemonStatus

SUMMARY = "show workers, lent components, queue and counters"
DESCRIPTION = (
    "Show the daemon's state: a table for people, or JSON for programs. Exits with 0 in any state, unless --check is "
    "given."
)
EXAMPLES = """\
examples:
  xditd status
  xditd status --json | jq .group_state
  xditd status --check >/dev/null && echo ready
  xditd status --watch 2                   until Ctrl-C; with --json a document on each line
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, StatusFlags)


def run(parsed: argparse.Namespace) -> int:
    from xditd.client.client import Client
    from xditd.client.waiting import why_not_serving

    if parsed.watch is not None:
        return _watch(parsed)
    with Client(parsed.runtime_dir, name="xditd status") as client:
        found = client.status()
    print(json_text(msgspec.to_builtins(found), indent=2) if parsed.json else describe(found))
    why = why_not_serving(found) if parsed.check else ""
    if why:
        print_error(f"xditd status: {why}")
    return exits.FAILED if why else exits.DONE


def _watch(parsed: argparse.Namespace) -> int:
    if parsed.check:
        raise BadRequest("--check: is for one look; leave out --watch, or wait with xditd wait")

    def show(found: DaemonStatus) -> str:
        return json_text(msgspec.to_builtins(found)) if parsed.json else describe(found)

    try:
        watch(parsed.runtime_dir, "xditd status", parsed.watch, show)
    except KeyboardInterrupt:
        return exits.INTERRUPTED  # the normal end of --watch
    return exits.DONE
