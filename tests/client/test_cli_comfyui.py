"""``xditd comfyui``: install, check and uninstall, and the folders that it does not change."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest

from xditd.client.cli import exits
from xditd.client.cli.main import main


@pytest.fixture
def comfyui(tmp_path) -> Path:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    return tmp_path


def test_install_check_uninstall(comfyui, capsys):
    folder = comfyui / "custom_nodes" / "xditd"
    assert main(["comfyui", "check", str(comfyui)]) == exits.FAILED
    assert "not installed" in capsys.readouterr().out
    assert main(["comfyui", "install", str(comfyui)]) == exits.DONE
    assert main(["comfyui", "install", str(comfyui)]) == exits.DONE
    assert main(["comfyui", "check", str(comfyui)]) == exits.DONE
    for name in ("__init__.py", "web/docs/XDiTKSampler.md", "locales/zh/nodeDefs.json", "example_workflows"):
        assert (folder / name).exists()
    assert main(["comfyui", "uninstall", str(comfyui)]) == exits.DONE
    assert not folder.exists()


def test_check_names_what_was_edited_and_an_environment_without_xditd(comfyui, capsys):
    main(["comfyui", "install", str(comfyui)])
    (comfyui / "custom_nodes/xditd/locales/zh/nodeDefs.json").write_text("{}")
    python = comfyui / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')  # no site-packages
    python.chmod(0o755)
    capsys.readouterr()
    assert main(["comfyui", "check", str(comfyui)]) == exits.FAILED
    said = capsys.readouterr().out
    assert "nodeDefs.json: missing, of another version, or edited" in said
    assert "cannot import xditd" in said


def test_the_folder_offers_the_entry_point(comfyui):
    main(["comfyui", "install", str(comfyui)])
    entry = comfyui / "custom_nodes/xditd/__init__.py"
    spec = importlib.util.spec_from_file_location("installed_pack", entry)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert inspect.iscoroutinefunction(module.comfy_entrypoint)
    assert (entry.parent / module.WEB_DIRECTORY).is_dir()


def test_other_folders_are_refused_and_unchanged(tmp_path, comfyui, capsys):
    assert main(["comfyui", "install", str(tmp_path / "nowhere")]) == exits.MISUSE
    assert "main.py" in capsys.readouterr().err
    theirs = comfyui / "custom_nodes" / "xditd" / "__init__.py"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine = 1")
    for action in ("install", "uninstall"):
        assert main(["comfyui", action, str(comfyui)]) == exits.MISUSE
    assert theirs.read_text() == "mine = 1"
    theirs.unlink()
    theirs.parent.rmdir()
    assert main(["comfyui", "uninstall", str(comfyui)]) == exits.MISUSE


def test_an_install_that_fails_leaves_what_was_there(comfyui, capsys, monkeypatch):
    assert main(["comfyui", "install", str(comfyui)]) == exits.DONE
    before = sorted(path.name for path in (comfyui / "custom_nodes").rglob("*"))
    monkeypatch.setattr("xditd.client.cli.comfyui.DATA", ("locales", "not there"))
    assert main(["comfyui", "install", str(comfyui), "--json"]) == exits.FAILED
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["error"]["code"] == "output_failed"
    assert "Traceback" not in captured.err
    assert sorted(path.name for path in (comfyui / "custom_nodes").rglob("*")) == before
