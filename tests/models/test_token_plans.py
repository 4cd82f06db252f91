"""Every class with a token plan gives on several ranks what its own forward gives on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from class_entries import ENTRIES
from plan_cases import MOST_USED, PLAN_ENTRIES
from token_counts import BUILDERS, COUNTS

from xditd.gpu_workers.models.token_plans import TokenPlan
from xditd.gpu_workers.plans import plans

TOLERANCE = 1e-6
Found = dict[str, dict[str, dict[str, Any]]]
PLANNED = {name for name, plan in plans().items() if isinstance(plan, TokenPlan)}


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Found]:
    """Return what ranks found for the class of an entry; ranks of one number run all classes of a test run."""

    @cache
    def run(counts: str, classes: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("plans")
        run_program(Path(__file__).with_name("plans_on_ranks.py"), str(folder), counts, *classes)
        return folder

    def find(name: str, ranks: int) -> Found:
        others = tuple(sorted(PLANNED - set(MOST_USED)))
        # One program for 2 and 4 ranks: what costs most is to import diffusers and to build the models.
        folder = run("3" if ranks == 3 else "2,4", MOST_USED if name in MOST_USED else others)
        found: Found = json.loads((folder / f"ranks{ranks}.json").read_text())
        return found

    return find


def run_program(program: Path, *arguments: str) -> None:
    """Run a program beside this file, with the modules that tests of models share."""
    support = str(program.with_name("support"))
    environment = os.environ | {"PYTHONPATH": support, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_class_has_a_plan_or_a_reason() -> None:
    assert {entry.name for entry in ENTRIES.values()} - set(plans()) == set()


def test_every_plan_is_of_a_class() -> None:
    assert set(plans()) - {entry.name for entry in ENTRIES.values()} == set()


def test_every_reason_is_a_sentence() -> None:
    for name, reason in plans().items():
        if isinstance(reason, str):
            assert len(reason.split()) > 3, name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "key"),
    [
        pytest.param(
            ranks, key, marks=pytest.mark.long if ranks == 3 or entry.name not in MOST_USED else (), id=f"{key}-{ranks}"
        )
        for ranks in (2, 4, 3)
        for key, entry in PLAN_ENTRIES.items()
        if entry.name in PLANNED
    ],
)
def test_ranks_give_what_the_class_gives(find: Callable[[str, int], Found], ranks: int, key: str) -> None:
    calls = find(PLAN_ENTRIES[key].name, ranks)[key]
    for call, found in calls.items():
        if ranks > 2 and re.search("^PlanFault.*are fewer than", found["fault"]):
            continue  # the tiny model's text or image has too few tokens for so many ranks
        assert not found["fault"], call
        assert found["error"] <= TOLERANCE, call
        assert found["is_same_again"], call
        assert found["is_same_on_ranks"], call
    if key in BUILDERS:
        assert len(calls) >= 1 + 2 * len(COUNTS)
