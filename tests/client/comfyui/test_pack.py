"""The pack's folder: help pages, translations, example workflows, import time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xditd.client.comfyui as pack
from xditd.client.comfyui import families

ROOT = Path(pack.__file__).parent


def test_import_is_light(tmp_path):
    # Processor time, and the best of five, so that a busy machine does not fail the test; with compiled bytecode, which
    # the first run writes.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    check = (
        "import sys, time; t = time.process_time(); import xditd.client.comfyui; print(time.process_time() - t, "
        "*[name for name in ('torch', 'xfuser', 'diffusers', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", check]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(5)]
    assert list(tmp_path.rglob("*.pyc"))
    assert all(len(run.stdout.split()) == 1 for run in runs)
    assert min(float(run.stdout) for run in runs) <= 0.2


def test_web_directory_has_help_in_both_languages():
    docs = ROOT / pack.WEB_DIRECTORY / "docs"
    names = {path.stem for path in docs.glob("*.md")}
    assert names == json.loads((ROOT / "locales/en/nodeDefs.json").read_text()).keys()
    for name in names:
        assert (docs / name / "en.md").read_text() == (docs / f"{name}.md").read_text()
        assert (docs / name / "zh.md").read_text() != (docs / f"{name}.md").read_text()


MADE_OF_TITLES = {"XDiTAccelerate": "model", "XDiTKSampler": "model", "XDiTUNetLoader": "unet_name"}
"""Inputs whose English tooltip lists the families. The node makes it; a text in the English file would replace it."""


def test_translations_have_the_same_keys():
    def keys(value: object) -> object:
        return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None

    english, chinese = (
        json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text()) for language in ("en", "zh")
    )
    for node, name in MADE_OF_TITLES.items():
        del chinese[node]["inputs"][name]["tooltip"]
    assert keys(english) == keys(chinese)


def test_texts_that_are_files_name_no_family():
    """Else each new family would change them. ComfyUI's nodes and files may have a family's name."""
    titled = [each.title.partition(" (")[0] for each in families.adapters()]
    texts = [*ROOT.glob("locales/*/*.json"), *ROOT.glob("web/docs/**/*.md"), ROOT / "pyproject.toml"]
    assert len(texts) > 2
    for path in texts:
        assert not [title for title in titled if title in path.read_text()], path


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_links_of_the_examples_meet(path):
    drawn = json.loads(path.read_text())
    nodes = {node["id"]: node for node in drawn["nodes"]}
    for number, source, out, target, into, kind in drawn["links"]:
        assert nodes[source]["outputs"][out]["type"] == kind
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into] == {**nodes[target]["inputs"][into], "type": kind, "link": number}
