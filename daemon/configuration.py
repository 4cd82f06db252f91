"""The daemon's configuration: one frozen dataclass, built once from defaults, a file, the environment and flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

from xditd.daemon.settings import SETTINGS, Setting
from xditd.ipc import limits
from xditd.ipc.addresses import RuntimeDir, default_runtime_dir, user_path
from xditd.ipc.degrees import AUTO
from xditd.ipc.errors import BadRequest
from xditd.ipc.suggestions import did_you_mean

Device = Literal["auto", "cuda", "cpu"]
Kernels = Literal["auto", "fused", "plain"]
Precision = Literal["bf16", "fp8"]

DEFAULT_WORKER_COMMAND: Final = (sys.executable, "-m", "xditd.gpu_workers")

_SECTIONS: Final = ("daemon", "workers")
_COMMAND_KEY: Final = "command"


@dataclass(frozen=True)
class Configuration:
    """What the daemon is told. ``workers`` is "auto" or a count; ``layout`` is "auto" or degrees by name."""

    runtime: RuntimeDir
    queue_limit: int = 512
    client_queue_limit: int = 64
    client_loan_limit: int = 64
    client_lent_bytes: int = 2**40
    client_io_bytes: int = 16 * 2**30
    message_bytes: int = limits.MAX_MESSAGE_BYTES
    client_deadline_s: float = 60.0
    drain_deadline_s: float = 20.0
    log_level: str = "info"
    metrics: str = "off"
    workers: Literal["auto"] | int = "auto"
    device: Device = "auto"
    layout: str = AUTO
    attention_backend: str = "auto"
    kernels: Kernels = "auto"
    precision: Precision = "bf16"
    start_deadline_s: float = 120.0
    hang_deadline_s: float = 300.0
    step_deadline_s: float = 10.0
    lend_deadline_s: float = 60.0
    max_restarts: int = 5
    worker_command: tuple[str, ...] = DEFAULT_WORKER_COMMAND
    """How the group's leader is started, its own flags apart. In the file only (``[workers] command``)."""


def default_file(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "/")) / ".config")
    return Path(base) / "xditd" / "xditd.toml"


def build_configuration(
    flags: Mapping[str, str | None], environ: Mapping[str, str], folder: Path | None = None
) -> Configuration:
    """Merge the sources: a flag beats its environment variable, which beats the file, which beats the default.

    Relative paths count from ``folder``, the one in which the daemon was started; without one they are refused.

    Raises:
        BadRequest: an unknown key, or a value that does not fit; the message names source, value and remedy.
    """
    found: dict[str, Any] = {}
    named = flags.get("config") or environ.get("XDITD_CONFIG")
    path = _absolute(user_path(named) if named else default_file(environ), folder)
    if named or path.is_file():
        found.update(_read_file(path))
    for setting in SETTINGS:
        variable = environ.get(setting.variable)
        if variable:
            found[setting.name] = setting.read_text(variable, f"environment variable {setting.variable}")
        flag = flags.get(setting.name)
        if flag is not None:
            found[setting.name] = setting.read_text(flag, f"flag {setting.flag}")
    runtime_dir = found.pop("runtime_dir", None) or default_runtime_dir().path
    command = found.get("worker_command")
    if command and os.sep in command[0]:
        found["worker_command"] = (str(_absolute(command[0], folder)), *command[1:])
    return Configuration(runtime=RuntimeDir(_absolute(user_path(runtime_dir), folder)), **found)


def _absolute(path: str | Path, folder: Path | None) -> Path:
    if folder is None and not os.path.isabs(path):
        raise BadRequest(f"path {path}: counts from the current folder, which was removed; name it in full, from / on")
    # Without "..": what it goes through may be removed.
    return Path(os.path.normpath(path if folder is None else folder / path))


def _read_file(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, table in _parse_toml(path).items():
        known: dict[str, Setting] = {setting.key: setting for setting in SETTINGS if setting.section == section}
        if not known or not isinstance(table, dict):
            hint = did_you_mean(section, _SECTIONS)
            raise BadRequest(f"file {path}: unknown entry [{section}]; the sections are [daemon] and [workers]{hint}")
        for key, value in table.items():
            source = f"file {path}, [{section}] {key}"
            if section == "workers" and key == _COMMAND_KEY:
                found["worker_command"] = _read_command(value, source)
            elif key in known:
                found[known[key].name] = known[key].read_toml(value, source)
            else:
                names = sorted([*known, *([_COMMAND_KEY] if section == "workers" else [])])
                raise BadRequest(
                    f"{source} = {value!r}: no such key; remove it, or use one of {', '.join(names)}"
                    f"{did_you_mean(key, names)}"
                )
    return found


def _read_command(value: object, source: str) -> tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(word, str) and word for word in value):
        return tuple(cast("list[str]", value))
    raise BadRequest(f'{source} = {value!r}: use a list of words, such as ["numactl", "-N0", "python", "-m", ...]')


def _parse_toml(path: Path) -> dict[str, Any]:
    # Imported here: most daemons run without a file, and start-up time is counted.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadRequest(
            f"file {path}: {error.strerror}; name another one (--config or XDITD_CONFIG), or none"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"file {path}: not TOML: {error}; see the example xditd.toml in xditd/systemd") from error
