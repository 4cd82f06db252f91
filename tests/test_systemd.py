"""The example configuration and the unit say what the daemon does."""

from __future__ import annotations

import configparser
import re
from dataclasses import replace
from pathlib import Path

from xditd.daemon.configuration import Configuration, build_configuration
from xditd.daemon.settings import SETTINGS

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
    assert replace(shown, runtime=defaults.runtime, worker_command=defaults.worker_command) == defaults


def test_example_shows_every_setting_and_its_variable() -> None:
    for setting in SETTINGS:
        assert re.search(rf"^# {setting.key} = ", EXAMPLE, flags=re.MULTILINE), setting.key
        assert re.search(rf"\b{setting.variable}\b", EXAMPLE), setting.variable


def test_unit_starts_the_installed_command_and_stops_the_daemon_first() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(SYSTEMD / "xditd.service")
    service = unit["Service"]
    assert service["Type"] == "exec"
    assert re.fullmatch(r"%h/\S+/bin/xditd serve", service["ExecStart"])
    assert service["KillMode"] == "mixed"
    assert service["RuntimeDirectoryMode"] == "0700"
