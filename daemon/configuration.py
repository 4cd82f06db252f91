"""Build the daemon's configuration from defaults, a TOML file, the environment and flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xditd.ipc.addresses import RuntimeDir, user_path
from xditd.ipc.errors import BadRequest
from xditd.ipc.settings.daemon import CONFIG_VARIABLE, SECTIONS, SETTINGS, DaemonSettings
from xditd.ipc.suggestions import did_you_mean
from xditd.ipc.toml_text import parse_toml


class Configuration(DaemonSettings, frozen=True, kw_only=True):
    """The daemon's settings, with absolute paths. A reload builds another one."""

    @property
    def runtime(self) -> RuntimeDir:
        return RuntimeDir(Path(self.runtime_dir))


def default_file(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "/")) / ".config")
    return Path(base) / "xditd" / "xditd.toml"


def build_configuration(
    flags: Mapping[str, str | None], environ: Mapping[str, str], folder: Path | None = None
) -> Configuration:
    """Merge the sources: a flag beats its environment variable, which beats the file, which beats the default.

    Relative paths are resolved against ``folder``, in which the daemon was started; without it they are refused.

    Raises:
        BadRequest: an unknown key, or a value that does not fit; the message names source, value and remedy.
    """
    found: dict[str, Any] = {}
    named = flags.get("config") or environ.get(CONFIG_VARIABLE)
    path = _absolute(user_path(named) if named else default_file(environ), folder)
    if named or path.is_file():
        found.update(_read_file(path))
    for setting in SETTINGS:
        variable = environ.get(setting.variable)
        if variable:
            found[setting.name] = setting.read(variable, f"environment variable {setting.variable}")
        flag = flags.get(setting.name)
        if flag is not None:
            found[setting.name] = setting.read(flag, f"flag {setting.flag}")
    if "runtime_dir" in found:
        found["runtime_dir"] = str(_absolute(user_path(found["runtime_dir"]), folder))
    command = found.get("worker_command")
    if command and os.sep in command[0]:
        found["worker_command"] = (str(_absolute(command[0], folder)), *command[1:])
    return Configuration(**found)


def _absolute(path: str | Path, folder: Path | None) -> Path:
    if folder is None and not os.path.isabs(path):
        raise BadRequest(f"path {path}: relative to the current folder, which was removed; use an absolute path")
    # Without "..": a folder that the path passes through may be removed later.
    return Path(os.path.normpath(path if folder is None else folder / path))


def _read_file(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, table in _parse_toml(path).items():
        if section not in SECTIONS or not isinstance(table, dict):
            hint = did_you_mean(section, SECTIONS)
            listed = " and ".join(f"[{name}]" for name in SECTIONS)
            raise BadRequest(f"file {path}: unknown entry [{section:.100}]; the sections are {listed}{hint}")
        known = {setting.key: setting for setting in SETTINGS if setting.section == section}
        for key, value in table.items():
            source = f"file {path}, [{section}] {key:.100}"
            if key not in known:
                raise BadRequest(
                    f"{source} = {value!r:.100}: no such key; remove it, or use one of {', '.join(sorted(known))}"
                    f"{did_you_mean(key, known)}"
                )
            found[known[key].name] = known[key].read(value, source)
    return found


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text("utf-8"))
    except OSError as error:
        raise BadRequest(
            f"file {path}: {error.strerror}; name another one (--config or {CONFIG_VARIABLE}), or none"
        ) from error
    except ValueError as error:  # also bytes that are no UTF-8
        raise BadRequest(f"file {path}: not TOML: {error}; see the example xditd.toml in xditd/systemd") from error
