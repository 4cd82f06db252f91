"""``xditd install-service``: write, check and remove the systemd units of this installation."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.client.systemd_units import Service, ServiceFile, check_user, remove, verify, write
from xditd.ipc.errors import BadRequest
from xditd.ipc.settings.client import InstallFlags

SUMMARY = "write and check systemd units for this installation"
DESCRIPTION = (
    "Write systemd units that start the xditd of this environment, and print what to run next. Nothing is started, "
    "stopped or enabled. A user service is the default; --system writes a template that runs as the named user."
)
EXAMPLES = """\
examples:
  xditd install-service                             writes ~/.config/systemd/user/xditd.service and .socket
  sudo xditd install-service --system --for alice   writes /etc/systemd/system/xditd@.service and .socket
  xditd install-service --check                     checks that they exist, are current and are valid
  xditd install-service --dry-run                   prints what would be written
  xditd install-service --uninstall                 removes the files
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, InstallFlags)


def run(parsed: argparse.Namespace) -> int:
    if parsed.user and parsed.system:
        raise BadRequest("--user and --system: choose one")
    if parsed.check + parsed.uninstall + parsed.dry_run > 1:
        raise BadRequest("--check, --uninstall and --dry-run: choose one")
    owner: str | None = parsed.owner
    if parsed.system != bool(owner):
        raise BadRequest("--system and --for USER: give both or none; a system service shares memory with one user")
    service = Service(check_user(owner) if owner else None, Path("/"), os.environ)
    found = service.files()
    if parsed.uninstall:
        return _uninstall(service, found, as_json=parsed.json)
    complaints = verify(found, service)
    before = {file.path: file.state for file in found}
    if not (parsed.check or parsed.dry_run) and not complaints:
        for file in found:
            if before[file.path] != "current":
                write(file)
    is_bad = bool(complaints) or (parsed.check and any(state != "current" for state in before.values()))
    if parsed.json:
        print(json_text(_facts(service, found, before, complaints, with_content=parsed.dry_run), indent=2))
    elif parsed.dry_run:
        print("\n".join(f"# {file.path} ({before[file.path]})\n{file.content}" for file in found), end="")
    else:
        _describe(service, found, before, is_check=parsed.check, is_bad=is_bad)
    for line in complaints:
        print(f"xditd install-service: systemd-analyze verify: {line}", file=sys.stderr)
    return exits.FAILED if is_bad else exits.DONE


def _describe(
    service: Service, found: tuple[ServiceFile, ...], before: dict[Path, str], *, is_check: bool, is_bad: bool
) -> None:
    words = {"missing": "written", "different": "replaced", "current": "unchanged"}
    for file in found:
        state = before[file.path]
        print(f"{(state if is_check or is_bad else words[state]):<10} {file.path}")
    if not is_check and not is_bad:
        print("\nnext:")
        print("\n".join(f"  {command}" for command in service.next_commands()))
        if service.user:
            print(f"\nprograms of {service.user} find it by XDITD_RUNTIME_DIR=/run/xditd/{service.user}")


def _uninstall(service: Service, found: tuple[ServiceFile, ...], *, as_json: bool) -> int:
    paths = [*service.enablements(), *(file.path for file in found)]
    removed = [str(path) for path in paths if remove(path)]
    commands = service.stop_commands() if removed else ()
    if as_json:
        print(json_text({"removed": removed, "next": commands}))
        return exits.DONE
    for path in removed:
        print(f"removed    {path}")
    print("\nnext, to stop the service if it runs:" if removed else "nothing was installed")
    for command in commands:
        print(f"  {command}")
    return exits.DONE


def _facts(
    service: Service,
    found: tuple[ServiceFile, ...],
    before: dict[Path, str],
    complaints: list[str],
    *,
    with_content: bool,
) -> dict[str, object]:
    return {
        "units": list(service.units),
        "files": [
            {"path": str(file.path), "was": before[file.path], **({"content": file.content} if with_content else {})}
            for file in found
        ],
        "complaints": complaints,
        "next": list(service.next_commands()),
    }
