"""``xditd wait``: wait until the daemon answers and its workers are ready."""

from __future__ import annotations

import argparse
import contextlib

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text, print_error
from xditd.ipc.settings.client import WaitFlags
from xditd.ipc.status import DaemonStatus

SUMMARY = "wait until the daemon answers and its workers are ready"
DESCRIPTION = (
    "Wait for a daemon that starts. Exits with 0 when its workers accept jobs, with 1 if they are not ready in time or "
    "are given up, with 3 if no daemon answers in time. Prints the reason for waiting to stderr."
)
EXAMPLES = """\
examples:
  xditd serve & xditd wait && xditd status
  xditd wait --for daemon --wait-s 5
  xditd wait --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, WaitFlags)


def run(parsed: argparse.Namespace) -> int:
    from xditd.client.client import Client
    from xditd.client.waiting import wait_for

    def show(what: str) -> None:
        print_error(f"xditd wait: {what}")

    with contextlib.ExitStack() as stack:
        clients: list[Client] = []

        def get_status() -> DaemonStatus:
            if not clients:
                clients.append(stack.enter_context(Client(parsed.runtime_dir, name="xditd wait")))
            return clients[0].status()

        found = wait_for(get_status, parsed.wait_s, workers=parsed.target == "workers", show=show)
    if parsed.json:
        print(json_text({"pid": found.pid, "group_state": found.group_state.value, "workers": found.world_size}))
    else:
        print(f"daemon {found.pid}: workers {found.group_state.value}")
    return exits.DONE
