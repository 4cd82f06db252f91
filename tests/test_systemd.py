"""The example configuration and the units say what the daemon does, and systemd finds nothing wrong with them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from xditd.daemon.configuration import Configuration, build_configuration
from xditd.ipc.settings.daemon import SETTINGS

needs_systemd_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
SYSTEMD = Path(__file__).resolve().parent.parent / "systemd"
EXAMPLE = (SYSTEMD / "xditd.toml").read_text()
KEY = re.compile(r"^# (?=[a-z_]+ = )", flags=re.MULTILINE)


def configuration_of(folder: Path, text: str) -> Configuration:
    path = folder / "xditd.toml"
    path.write_text(text)
    return build_configuration({"config": str(path)}, {})


def test_example_as_it_stands_changes_nothing(tmp_path: Path) -> None:
    assert configuration_of(tmp_path, EXAMPLE) == configuration_of(tmp_path, "")


def test_example_shows_the_defaults(tmp_path: Path) -> None:
    defaults = configuration_of(tmp_path, "")
    shown = configuration_of(tmp_path, KEY.sub("", EXAMPLE))
    # These two depend on the user and on the installation; the example shows typical values.
    assert replace(shown, runtime_dir=defaults.runtime_dir, worker_command=defaults.worker_command) == defaults


def test_example_shows_every_setting_and_its_variable() -> None:
    for setting in SETTINGS:
        remedy = f"systemd/xditd.toml: explain {setting.key}, with {setting.variable}"
        assert re.search(rf"^# {setting.key} = ", EXAMPLE, flags=re.MULTILINE), remedy
        assert re.search(rf"\b{setting.variable}\b", EXAMPLE), remedy


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Read a unit file: sections, and every value of each directive in order."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in (SYSTEMD / name).read_text().splitlines():
        if line.startswith("["):
            section = found[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", ["xditd.service", "xditd@.service"])
def test_service_unit_keeps_what_the_daemon_relies_on(name: str) -> None:
    service = unit(name)["Service"]
    for key, value in {
        "Type": "notify",
        "KillMode": "mixed",
        "OOMPolicy": "continue",
        "RuntimeDirectoryMode": "0700",
        "RuntimeDirectoryPreserve": "yes",
        "LimitMEMLOCK": "infinity",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "ExecReload": "/bin/kill -HUP $MAINPID",
    }.items():
        assert service[key] == [value], key
    assert int(service["WatchdogSec"][0]) >= 10
    assert re.fullmatch(r"\S+/bin/xditd serve( --runtime-dir /run/xditd/%i)?", service["ExecStart"][0])


def test_cluster_unit_joins_and_leaves_the_daemon_to_its_own_unit() -> None:
    found = unit("xditd-cluster.service")
    service = found["Service"]
    assert re.fullmatch(r"\S+/bin/xditd cluster join", service["ExecStart"][0])
    assert {key: service[key] for key in ("KillMode", "Restart", "RestartPreventExitStatus")} == {
        "KillMode": ["mixed"],
        "Restart": ["on-failure"],
        "RestartPreventExitStatus": ["2"],
    }
    assert found["Unit"]["After"] == ["xditd.service"]
    assert not found["Unit"].keys() & {"Wants", "Requires", "BindsTo", "PartOf"}


def test_user_unit_needs_no_mount_namespace() -> None:
    """Such a directive would put the daemon into a user namespace, from where it cannot open what clients lend."""
    forbidden = ("Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "TemporaryFileSystem", "Bind", "Device")
    assert [key for key in unit("xditd.service")["Service"] if key.startswith(forbidden)] == []


def test_system_unit_leaves_alone_what_breaks_lending_and_says_why() -> None:
    service = unit("xditd@.service")["Service"]
    text = (SYSTEMD / "xditd@.service").read_text()
    for key in ("PrivateDevices", "MemoryDenyWriteExecute", "PrivateUsers", "PrivateTmp", "ProtectProc", "RemoveIPC"):
        assert key not in service
        assert re.search(rf"^# .*\b{key}\b.*:", text, flags=re.MULTILINE), key
    assert service["User"] == ["%i"]


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """The units as an installation has them, where systemd-analyze can look at them."""
    for name in ("xditd.service", "xditd.socket", "xditd@.service", "xditd@.socket", "xditd-cluster.service"):
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (SYSTEMD / name).read_text(), flags=re.MULTILINE)
        (tmp_path / name.replace("@", "@daemon")).write_text(text)
    return tmp_path


def analyze(rendered: Path, *arguments: str) -> str:
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(rendered), "SYSTEMD_LOG_TARGET": "console"}
    done = subprocess.run(
        ["systemd-analyze", *arguments], cwd=rendered, capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd_analyze
def test_units_are_clean(rendered: Path) -> None:
    assert analyze(rendered, "verify", "--man=no", "./xditd@daemon.service", "./xditd@daemon.socket") == ""
    assert analyze(rendered, "--user", "verify", "--man=no", "./xditd.service", "./xditd.socket") == ""
    assert analyze(rendered, "--user", "verify", "--man=no", "./xditd-cluster.service") == ""


@needs_systemd_analyze
def test_verify_would_notice_a_mistake(rendered: Path) -> None:
    with (rendered / "xditd.service").open("a") as file:
        file.write("Wanted=x\n")
    with pytest.raises(AssertionError):
        assert analyze(rendered, "--user", "verify", "--man=no", "./xditd.service") == ""


@needs_systemd_analyze
def test_system_unit_is_closed(rendered: Path) -> None:
    out = analyze(rendered, "security", "--offline=true", "--no-pager", "./xditd@daemon.service")
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", out)
    assert found is not None, out
    assert float(found.group(1)) <= 2.5
