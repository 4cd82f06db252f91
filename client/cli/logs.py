"""``xditd logs``: show recent log lines of the daemon and its workers."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.ipc.settings.client import LogsFlags

SUMMARY = "show recent log lines of the daemon and its workers"
DESCRIPTION = "Show the log lines of the daemon and its workers that the daemon keeps in memory."
EXAMPLES = """\
examples:
  xditd logs -n 50
  xditd logs -f                  until Ctrl-C, or until the daemon exits
"""

_POLL_S: Final = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, LogsFlags)


def run(parsed: argparse.Namespace) -> int:
    from xditd.client.client import Client

    with Client(parsed.runtime_dir, name="xditd logs") as client:
        lines, next_line = client.logs()
        if parsed.lines is not None:
            lines = lines[len(lines) - min(parsed.lines, len(lines)) :]
        _print(lines, parsed.json)
        try:
            while parsed.follow:
                # The daemon sends no events for log lines; half a second is short enough at a terminal.
                time.sleep(_POLL_S)
                lines, next_line = client.logs(next_line)
                _print(lines, parsed.json)
        except KeyboardInterrupt:
            return exits.INTERRUPTED  # the normal end of --follow
    return exits.DONE


def _print(lines: list[str], as_json: bool) -> None:
    for line in lines:
        print(json_text({"line": line}) if as_json else line)
    sys.stdout.flush()
