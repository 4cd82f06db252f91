"""systemd units of this installation: their paths and content, and their check by ``systemd-analyze verify``."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from xditd.client.output_files import write_file
from xditd.ipc.errors import BadRequest, NotPermitted, OutputFailed, Unsupported

_SYSTEM_UNITS: Final = ("xditd@.service", "xditd@.socket")
_USER_UNITS: Final = ("xditd.service", "xditd.socket")
_VERIFY_DEADLINE_S: Final = 60.0


@dataclass(frozen=True)
class ServiceFile:
    """A file of the service: its path and its whole content."""

    path: Path
    content: str

    @property
    def state(self) -> str:
        """``missing``, ``current`` or ``different``."""
        try:
            return "current" if self.path.read_bytes() == self.content.encode() else "different"
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            raise NotPermitted(f"{self.path}: {error.strerror}; run this as the owner") from error


@dataclass(frozen=True)
class Service:
    """A user service, or with ``user`` a system service for that user. ``root`` is "/" except in tests."""

    user: str | None
    root: Path
    environ: Mapping[str, str]

    @property
    def units(self) -> tuple[str, str]:
        """The names of the service and its socket."""
        at = f"@{self.user}" if self.user else ""
        return f"xditd{at}.service", f"xditd{at}.socket"

    @property
    def systemctl(self) -> str:
        return "systemctl" if self.user else "systemctl --user"

    def files(self) -> tuple[ServiceFile, ...]:
        """All files with their content for this installation.

        Raises:
            Unsupported: this environment has no ``xditd`` command that a unit could start.
        """
        folder = self._unit_folder()
        command = xditd_command()
        units = tuple(
            ServiceFile(folder / name, render(_packaged(name), command))
            for name in (_SYSTEM_UNITS if self.user else _USER_UNITS)
        )
        if not self.user:
            return units
        others = ("tmpfiles.d/xditd.conf", "sysusers.d/xditd.conf")
        return units + tuple(ServiceFile(self.root / "etc" / name, _packaged(name)) for name in others)

    def next_commands(self) -> tuple[str, ...]:
        """Commands to run after the files are written."""
        service, socket = self.units
        enable = (f"{self.systemctl} daemon-reload", f"{self.systemctl} enable --now {socket} {service}")
        if self.user:
            return ("systemd-sysusers", "systemd-tmpfiles --create xditd.conf", *enable)
        return (*enable, "loginctl enable-linger    # to keep it while you are logged out")

    def stop_commands(self) -> tuple[str, ...]:
        """Commands to run after the files are removed: systemd still has the units loaded."""
        service, socket = self.units
        return (f"{self.systemctl} stop {socket} {service}", f"{self.systemctl} daemon-reload")

    def enablements(self) -> tuple[Path, ...]:
        """The links by which ``systemctl enable`` starts the units at boot or login."""
        folder = self._unit_folder()
        return tuple(
            link for name in self.units for link in sorted(folder.glob(f"*.wants/{name}")) if link.is_symlink()
        )

    def _unit_folder(self) -> Path:
        if self.user:
            return self.root / "etc" / "systemd" / "system"
        base = self.environ.get("XDG_CONFIG_HOME") or str(Path(self.environ.get("HOME", "/")) / ".config")
        return Path(base) / "systemd" / "user"


def check_user(name: str) -> str:
    """Return the name of an account that a system service can run as.

    Raises:
        BadRequest: no such account, or a name that systemd would escape in an instance name.
    """
    try:
        pwd.getpwnam(name)
    except KeyError:
        raise BadRequest(f"--for {name}: no such user on this machine") from None
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*", name):
        raise BadRequest(f"--for {name}: systemd would escape this name; use letters, digits, '_', '.' and '-'")
    return name


def xditd_command() -> Path:
    """Find the ``xditd`` command in the folder of this Python.

    Raises:
        Unsupported: there is none, or a unit cannot contain its path.
    """
    path = Path(sys.executable).parent / "xditd"
    if not os.access(path, os.X_OK):
        raise Unsupported(
            f"{path}: no such program; install xditd into this environment (pip install 'xditd[workers]')"
        )
    if re.search(r"[\s%$\"'\\]", str(path)):
        raise Unsupported(f"{path}: a unit cannot start a path with blanks, quotes, '%' or '$'; move the environment")
    return path


def render(unit: str, command: Path) -> str:
    """Replace the program in the unit's ``ExecStart`` by ``command``."""
    return re.sub(r"^(ExecStart=)\S+/xditd ", rf"\g<1>{command} ", unit, flags=re.MULTILINE)


def verify(found: tuple[ServiceFile, ...], service: Service) -> list[str]:
    """Check the units by ``systemd-analyze verify``; returns its messages, none if it is not installed."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return []
    try:
        with tempfile.TemporaryDirectory(prefix="xditd-") as folder:
            return _run_verify(analyze, Path(folder), found, service)
    except OSError as error:
        return [f"systemd-analyze could not be run: {error.strerror or error}"]
    except subprocess.TimeoutExpired:
        return [f"systemd-analyze did not finish within {_VERIFY_DEADLINE_S:.0f} s"]


def _run_verify(analyze: str, folder: Path, found: tuple[ServiceFile, ...], service: Service) -> list[str]:
    names = []
    for file in found:
        if file.path.suffix in (".service", ".socket"):
            # A template is verified as the instance for this user.
            name = file.path.name.replace("@.", f"@{service.user}.")
            (folder / name).write_text(file.content)
            names.append(f"./{name}")
    scope = [] if service.user else ["--user"]
    done = subprocess.run(
        [analyze, *scope, "verify", "--man=no", *names],
        cwd=folder,
        env={**service.environ, "XDG_RUNTIME_DIR": service.environ.get("XDG_RUNTIME_DIR", str(folder))},
        capture_output=True,
        text=True,
        timeout=_VERIFY_DEADLINE_S,
        check=False,
    )
    lines = [line.replace(f"{folder}/", "") for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines or ([] if done.returncode == 0 else [f"systemd-analyze ended with status {done.returncode}"])


def write(file: ServiceFile) -> None:
    """Write a file atomically.

    Raises:
        NotPermitted: its folder cannot be created or written.
        OutputFailed: the disk has no room.
    """
    try:
        write_file(file.path, file.content.encode(), mode=0o644)
    except OutputFailed as error:
        if isinstance(error.__cause__, PermissionError):
            raise NotPermitted(f"{error.detail}: system units need root (sudo), or use --user") from error
        raise


def remove(path: Path) -> bool:
    """Remove a file or link; returns whether it existed.

    Raises:
        NotPermitted: its folder cannot be written.
    """
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise NotPermitted(f"{path}: {error.strerror}; system units need root (sudo)") from error
    return True


def _packaged(name: str) -> str:
    return files("xditd").joinpath("systemd", *name.split("/")).read_text("utf-8")
