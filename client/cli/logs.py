"""``xditd logs``: the daemon's and the workers' recent lines."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.ipc.settings.client import LogsFlags

SUMMARY = "show recent log lines of the daemon and its workers"
DESCRIPTION = "Show the log lines that the daemon keeps in memory, its workers' included."
EXAMPLES = """\
examples:
  xditd logs -n 50
  xditd logs -f                  until Ctrl-C, or the daemon's end
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
                # The daemon has no events for log lines; a reader at a terminal does not notice half a second.
                time.sleep(_POLL_S)
                lines, next_line = client.logs(next_line)
                _print(lines, parsed.json)
        except KeyboardInterrupt:
            return exits.INTERRUPTED  # how one stops following: nothing has failed
    return exits.DONE


def _print(lines: list[str], as_json: bool) -> None:
    for line in lines:
        print(json_text({"line": line}) if as_json else line)
    sys.stdout.flush()
