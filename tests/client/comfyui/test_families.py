"""The interface between the node pack and the model families: only family modules name a family."""

from __future__ import annotations

import re
from pathlib import Path

import xditd.client.comfyui as pack
from xditd.client.comfyui import families

ROOT = Path(pack.__file__).parent

A_FAMILY = re.compile(r"flux|z.?image|lumina|nextdit|wan\b|sd3|qwen|t5|clip.?l\b", re.IGNORECASE)


def test_modules_outside_of_the_folder_know_no_family():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.parent.name != "families"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if A_FAMILY.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_seam_itself_knows_no_number_of_a_family():
    for name in ("__init__", "rows"):
        text = (ROOT / "families" / f"{name}.py").read_text()
        assert not [line for line in text.splitlines() if A_FAMILY.search(line) and "MODULES" not in line]


def test_each_module_has_an_adapter():
    for name, adapter in zip(families.MODULES, families.adapters(), strict=True):
        assert (ROOT / "families" / f"{name}.py").exists()
        assert adapter.title in families.titles()
        assert any(adapter.title.lower().startswith(word) for word in families.search_words())
