"""The pack's folder: what ComfyUI reads from it, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import xditd.client.comfyui as pack

ROOT = Path(pack.__file__).parent


def test_import_is_light():
    # Processor time, and the best of five: a busy machine must not fail this, a careless import must.
    check = (
        "import sys, time; t = time.process_time(); import xditd.client.comfyui; print(time.process_time() - t, "
        "*[name for name in ('torch', 'xfuser', 'diffusers', 'transformers') if name in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True) for _ in range(5)]
    assert all(len(run.stdout.split()) == 1 for run in runs)
    assert min(float(run.stdout) for run in runs) <= 0.2


def test_web_directory_has_help_in_both_languages():
    docs = ROOT / pack.WEB_DIRECTORY / "docs"
    names = {path.stem for path in docs.glob("*.md")}
    assert names == json.loads((ROOT / "locales/en/nodeDefs.json").read_text()).keys()
    for name in names:
        assert (docs / name / "en.md").read_text() == (docs / f"{name}.md").read_text()
        assert (docs / name / "zh.md").read_text() != (docs / f"{name}.md").read_text()


def test_translations_have_the_same_keys():
    def keys(value: object) -> object:
        return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None

    found = [keys(json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text())) for language in ("en", "zh")]
    assert found[0] == found[1]


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_links_of_the_examples_meet(path):
    drawn = json.loads(path.read_text())
    nodes = {node["id"]: node for node in drawn["nodes"]}
    for number, source, out, target, into, kind in drawn["links"]:
        assert nodes[source]["outputs"][out]["type"] == kind
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into] == {**nodes[target]["inputs"][into], "type": kind, "link": number}
