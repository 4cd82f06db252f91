"""``xditd install-service``: the files that it writes, checks and removes."""

import getpass
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from xditd.client import systemd_units
from xditd.client.cli import exits
from xditd.client.cli.main import main
from xditd.client.systemd_units import Service, check_user, remove, verify, write, xditd_command
from xditd.ipc.errors import BadRequest, NotPermitted, Unsupported


@pytest.fixture
def command(tmp_path, monkeypatch):
    """An environment with an xditd command in the folder of its Python."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    shutil.copy("/bin/true", folder / "xditd")
    monkeypatch.setattr(systemd_units.sys, "executable", str(folder / "python"))
    return folder / "xditd"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def run(capsys, *arguments):
    code = main(["install-service", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_life_of_a_user_service(command, home, capsys):
    unit = home / ".config" / "systemd" / "user" / "xditd.service"
    code, out, _ = run(capsys, "--check")
    assert code == exits.FAILED
    assert f"missing    {unit}" in out
    code, out, err = run(capsys)
    assert (code, err) == (exits.DONE, "")
    assert f"ExecStart={command} serve\n" in unit.read_text()
    assert "systemctl --user enable --now xditd.socket xditd.service" in out
    assert run(capsys, "--check")[0] == exits.DONE
    unit.write_text(unit.read_text() + "# changed\n")
    code, out, _ = run(capsys, "--check", "--json")
    assert code == exits.FAILED
    assert {file["path"]: file["was"] for file in json.loads(out)["files"]}[str(unit)] == "different"
    assert f"replaced   {unit}" in run(capsys)[1]
    wants = unit.parent / "default.target.wants"
    wants.mkdir()
    (wants / "xditd.service").symlink_to(unit)
    code, out, _ = run(capsys, "--uninstall", "--json")
    assert len(json.loads(out)["removed"]) == 3
    assert [path for path in unit.parent.rglob("*") if not path.is_dir()] == []
    assert "nothing was installed" in run(capsys, "--uninstall")[1]


def test_dry_run_writes_nothing(command, home, capsys):
    code, out, _ = run(capsys, "--dry-run")
    assert code == exits.DONE
    assert f"ExecStart={command} serve" in out
    assert not (home / ".config").exists()


def test_system_service_for_one_user(command, tmp_path):
    service = Service("daemon", tmp_path / "root", {})
    found = service.files()
    assert verify(found, service) == []
    for file in found:
        write(file)
        assert file.path.stat().st_mode & 0o777 == 0o644
    assert {str(file.path.relative_to(tmp_path / "root")) for file in found} == {
        "etc/systemd/system/xditd@.service",
        "etc/systemd/system/xditd@.socket",
        "etc/tmpfiles.d/xditd.conf",
        "etc/sysusers.d/xditd.conf",
    }
    text = (tmp_path / "root/etc/systemd/system/xditd@.service").read_text()
    assert f"ExecStart={command} serve --runtime-dir /run/xditd/%i\n" in text
    assert service.units == ("xditd@daemon.service", "xditd@daemon.socket")
    assert "systemctl enable --now xditd@daemon.socket xditd@daemon.service" in service.next_commands()
    assert all(remove(file.path) for file in found)
    assert not remove(found[0].path)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_unit_that_systemd_complains_about_is_not_written(command, home, capsys, monkeypatch):
    monkeypatch.setattr(systemd_units, "render", lambda unit, _: unit.replace("Type=notify", "Type=no-such-type"))
    code, _, err = run(capsys)
    assert code == exits.FAILED
    assert "no-such-type" in err
    assert not (home / ".config").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--system"], "give both or none"),
        (["--for", getpass.getuser()], "give both or none"),
        (["--user", "--system", "--for", "x"], "choose one"),
        (["--system", "--for", "no-such-user"], "no such user"),
        (["--check", "--uninstall"], "choose one"),
    ],
)
def test_misuse(command, home, capsys, arguments, words):
    code, _, err = run(capsys, *arguments)
    assert code == exits.MISUSE
    assert words in err


def test_environment_without_the_command_is_named(command):
    command.unlink()
    with pytest.raises(Unsupported, match=rf"{re.escape(str(command))}: no such program; install"):
        xditd_command()


def test_path_that_a_unit_cannot_start_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "my venv"
    folder.mkdir()
    shutil.copy("/bin/true", folder / "xditd")
    monkeypatch.setattr(systemd_units.sys, "executable", str(folder / "python"))
    with pytest.raises(Unsupported, match="blanks"):
        xditd_command()


def test_root_is_a_user_too():
    assert check_user("root") == "root"
    with pytest.raises(BadRequest):
        check_user("no such user")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_missing_permissions_are_named(command):
    with pytest.raises(NotPermitted, match="sudo"):
        write(Service("root", systemd_units.Path("/"), {}).files()[0])


def test_importing_it_needs_no_torch():
    code = "import sys, xditd.client.systemd_units; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
