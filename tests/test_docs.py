"""What the documents state about the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xditd.daemon.groups.lifecycle import GROUP_NEXT
from xditd.daemon.loans.leases import LEASE_NEXT
from xditd.daemon.queue.jobs import JOB_NEXT
from xditd.ipc.protocol import PROTOCOL_VERSION

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(page for folder in ("docs", "models", "tools") for page in (ROOT / folder).rglob("*.md"))]
)


@pytest.mark.parametrize("document", ["architecture.md", "guarantees.md"])
@pytest.mark.parametrize(("title", "table"), [("group", GROUP_NEXT), ("lease", LEASE_NEXT), ("job", JOB_NEXT)])
def test_tables_of_states(title, table, document):
    text = (ROOT / "docs" / document).read_text()
    rows = re.search(rf"\| {title} \| may become \|\n\|---\|---\|\n((?:\|.*\|\n?)+)", text)
    assert rows is not None
    documented = {}
    for row in rows.group(1).splitlines():
        state, following = (cell.strip() for cell in row.strip("|").split("|"))
        documented[state] = {name for name in following.split(", ") if name}
    assert documented == {state.value: {to.value for to in following} for state, following in table.items()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def anchors_of(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^```.*?^```", "", document.read_text())
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"(?m)^#{1,6} (.+)$", text)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_anchors_are_headings(document):
    missing = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", document.read_text()):
        page = document.parent / target if target else document
        if page.suffix == ".md" and anchor not in anchors_of(page):
            missing.append(f"{target}#{anchor}")
    assert missing == []


@pytest.mark.parametrize("document", [page for page in DOCUMENTS if page.name != "CHANGELOG.md"], ids=lambda p: p.name)
def test_parts_of_the_benchmarks_and_tests_that_a_document_names_exist(document):
    text = document.read_text()
    parts = {path.stem for path in (ROOT / "benchmarks" / "parts").glob("*.py")}
    assert set(re.findall(r"run\.py ([a-z]\w*)", text)) <= parts
    named = set(re.findall(r"`((?:[\w/]+/)?test_\w+\.py)(?:::\w+)?`", text))
    assert [path for path in named if not list(ROOT.glob(path if "/" in path else f"tests/**/{path}"))] == []


def test_upgrading_names_the_version_of_the_protocol():
    assert f"The wire protocol is version {PROTOCOL_VERSION}." in (ROOT / "docs" / "upgrading.md").read_text()


@pytest.mark.parametrize("document", ["guarantees.md", "security.md"])
def test_every_promise_names_a_test_that_exists(document):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / document).read_text())
    assert len(named) > 10
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or (name and f"def {name}(" not in (ROOT / path).read_text())
    ]
    assert missing == []


def test_every_row_of_guarantees_names_a_test():
    rows = (ROOT / "docs" / "guarantees.md").read_text().partition("## States")[0].splitlines()
    rows = [row for row in rows if row.startswith("| ") and "shown by" not in row]
    assert len(rows) > 40
    assert [row for row in rows if "::test_" not in row] == []


@pytest.mark.parametrize("document", ["adding-a-family.md", "architecture.md", "glossary.md", "operations.md"])
def test_modules_that_a_document_names_exist(document):
    named = re.findall(r"`((?:client|daemon|gpu_workers|ipc)/[\w/]+\.py)`", (ROOT / "docs" / document).read_text())
    assert named != []
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_the_glossary_names_what_its_modules_define():
    text = (ROOT / "docs" / "glossary.md").read_text()
    missing = []
    for names, path in re.findall(r"((?:`[A-Z][\w.]+`,? )+)in `([\w/]+\.py)`", text):
        source = (ROOT / path).read_text()
        words = [word for name in re.findall(r"`([\w.]+)`", names) for word in name.split(".")]
        missing += [f"{path}: {word}" for word in words if not re.search(rf"(?:class|def) {word}\b|\b{word}:", source)]
    assert missing == []


def test_each_walk_passes_25_modules():
    walks = (ROOT / "docs" / "architecture.md").read_text().partition("## Two walks")[2].partition("\n## ")[0]
    assert [int(number) for number in re.findall(r"(?m)^(\d+)\. `", walks)] == [*range(1, 26)] * 2
