"""``xditd stop``: stop the daemon and its workers."""

from __future__ import annotations

import argparse

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.ipc.errors import DeadlineExceeded
from xditd.ipc.settings.client import StopFlags

SUMMARY = "stop the daemon and its workers"
DESCRIPTION = (
    "Stop the daemon and wait until it has exited. A running job may finish within the daemon's drain_deadline_s; "
    "queued jobs fail with daemon_stopping; lent memory is released."
)
EXAMPLES = """\
examples:
  xditd stop
  xditd stop --deadline-s 60
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, StopFlags)


def run(parsed: argparse.Namespace) -> int:
    from xditd.client.client import Client

    with Client(parsed.runtime_dir, name="xditd stop") as client:
        pid = client.daemon_pid
        is_stopped = client.stop(deadline_s=parsed.deadline_s)
    if not is_stopped:
        raise DeadlineExceeded(f"daemon {pid} has not exited within {parsed.deadline_s} s; see its log")
    print(json_text({"pid": pid, "stopped": True}) if parsed.json else f"stopped daemon {pid}")
    return exits.DONE
