"""Check the running daemon: its version, its worker group, and whether workers read this process's memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from xditd import __version__
from xditd.client.doctor.findings import Finding, fail, ok, warn
from xditd.client.doctor.layout import describe_layout
from xditd.ipc.errors import DaemonUnreachable, XditdError
from xditd.ipc.status import DaemonStatus, GroupState

if TYPE_CHECKING:
    from xditd.client.client import Client

CHECK_DEADLINE_S: Final = 30.0
LAYOUT: Final = "layout in use"


def check_daemon(runtime_dir: Path | None) -> tuple[list[Finding], int | None]:
    """Check the daemon, if one runs; also returns its pid."""
    # Imported here, because importing ZeroMQ takes as long as all other checks together.
    from xditd.client.client import Client

    try:
        with Client(runtime_dir, name="xditd doctor") as client:
            status = client.status()
            found = [_check_version(status), _check_group(status)]
            if status.layout is not None:
                found.append(describe_layout(LAYOUT, status.layout))
            if status.group_state in (GroupState.READY, GroupState.BUSY):
                found.append(_check_memory(client))
            return found, status.pid
    except DaemonUnreachable as error:
        return [warn("daemon", error.detail, "xditd serve, or systemctl --user start xditd")], None
    except XditdError as error:
        return [fail("daemon", f"{error.code}: {error.detail}", "see xditd logs, or journalctl --user -u xditd")], None


def _check_version(status: DaemonStatus) -> Finding:
    if status.package_version != __version__:
        return warn(
            "daemon",
            f"version {status.package_version}, this is {__version__}",
            "restart it after an upgrade: systemctl --user restart xditd",
        )
    return ok("daemon", f"version {status.package_version}, pid {status.pid}, {status.clients} clients")


def _check_group(status: DaemonStatus) -> Finding:
    state, detail = status.group_state, status.group_detail
    if state in (GroupState.READY, GroupState.BUSY):
        return ok("worker group", f"{state.value}, {status.world_size} on {status.device_kind}")
    if state is GroupState.GIVEN_UP:
        return fail("worker group", f"given up: {detail}", "see xditd logs, fix the cause, restart the daemon")
    return warn("worker group", f"{state.value}: {detail}", "wait for it, or see xditd logs")


def _check_memory(client: Client) -> Finding:
    try:
        client.check_memory(deadline_s=CHECK_DEADLINE_S)
    except XditdError as error:
        return fail(
            "memory check",
            f"{error.code}: {error.detail}",
            "run client and daemon as one user, in one pid namespace, without PrivateUsers= (see docs/operations.md)",
        )
    return ok("memory check", "every worker reads what this process wrote")
