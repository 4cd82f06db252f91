"""``xditd doctor``: check this machine, the installation and the daemon, and print remedies."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import msgspec
import zmq

from xditd import __version__
from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.client.cli.tables import table
from xditd.client.doctor import daemon, host, workers
from xditd.client.doctor.findings import Finding, Verdict, ok
from xditd.ipc.addresses import RuntimeDir, default_runtime_dir
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.settings.client import DoctorFlags

SUMMARY = "check GPUs, drivers, limits, permissions and the running daemon"
DESCRIPTION = (
    "Check what lending and jobs need, and print a remedy for each fault. Changes nothing. Exits with 1 if a check "
    "failed, with 0 after warnings. Importing the workers' libraries takes most of the time: --quick leaves it out."
)
EXAMPLES = """\
examples:
  xditd doctor
  xditd doctor --quick --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, DoctorFlags)


def run(parsed: argparse.Namespace) -> int:
    found = examine(parsed.runtime_dir, is_quick=parsed.quick)
    failed = [each for each in found if each.verdict is Verdict.FAIL]
    if parsed.json:
        print(json_text({"ok": not failed, "findings": [each.as_builtins() for each in found]}, indent=2))
    else:
        print(describe(found))
    return exits.FAILED if failed else exits.DONE


def examine(runtime_dir: Path | None, *, is_quick: bool) -> list[Finding]:
    """Run every check."""
    runtime = RuntimeDir(runtime_dir.absolute()) if runtime_dir else default_runtime_dir()
    devices, cluster = host.check_devices(), host.check_cluster(os.environ)
    answers, pid = daemon.check_daemon(runtime.path)
    limits = host.limits_of(pid)
    # A daemon that runs has a layout, for its own number of workers.
    is_layout_known = any(each.check == daemon.LAYOUT for each in answers)
    return [
        _versions(),
        *([devices] if devices else []),
        *([] if is_quick else workers.check_workers(workers.probe(), has_layout=not is_layout_known)),
        host.check_allocator(os.environ),
        *([cluster] if cluster else []),
        host.check_runtime_folder(runtime),
        host.check_shared_memory(),
        host.check_locked_memory(limits, has_gpu=devices is not None),
        host.check_open_files(limits),
        *answers,
    ]


def _versions() -> Finding:
    return ok(
        "versions",
        f"xditd {__version__}, protocol {PROTOCOL_VERSION}, Python {platform.python_version()}, "
        f"ZeroMQ {zmq.zmq_version()}, msgspec {msgspec.__version__}, Linux {platform.release()}",
    )


def describe(found: list[Finding]) -> str:
    """Format the findings as a table, with notes and remedies below it."""
    lines = [table(("CHECK", "", "FOUND"), [(each.check, each.verdict.value, each.detail) for each in found])]
    for each in found:
        if each.notes:
            lines += ["", each.check, *(f"  {note}" for note in each.notes)]
    remedies = [f"  {each.check}: {each.remedy}" for each in found if each.remedy]
    if remedies:
        lines += ["", "remedies", *remedies]
    return "\n".join(lines)
