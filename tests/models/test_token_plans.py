"""Every class with a token plan gives on several ranks what its own forward gives on one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from class_entries import ENTRIES
from forked_programs import ProgramServer
from plan_cases import MOST_USED, PLAN_ENTRIES
from token_counts import BUILDERS, COUNTS

from xditd.gpu_workers.models.token_plans import TokenPlan
from xditd.gpu_workers.plans import plans

TOLERANCE = 1e-6
Found = dict[str, dict[str, dict[str, Any]]]
SHORT = {2: MOST_USED}
"""The classes that each test run covers at each number of ranks; the others are for long runs."""
PLANNED = {name for name, plan in plans().items() if isinstance(plan, TokenPlan)}


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer) -> Callable[[str, int], Found]:
    """Return what ranks found for the class of an entry; ranks of one number run all classes of a test run."""
    program = Path(__file__).with_name("plans_on_ranks.py")

    @cache
    def run(ranks: int, classes: tuple[str, ...]) -> Found:
        folder = tmp_path_factory.mktemp("plans")
        support = program.with_name("support")
        done = fork_program(program, folder, ranks, *classes, folders=[support], timeout_s=800)
        assert done.returncode == 0, done.stderr[-4000:]
        found: Found = json.loads((folder / f"ranks{ranks}.json").read_text())
        return found

    def find(name: str, ranks: int) -> Found:
        short = SHORT.get(ranks, ())
        return run(ranks, short if name in short else tuple(sorted(PLANNED - set(short))))

    return find


def test_every_class_has_a_plan_or_a_reason() -> None:
    assert {entry.name for entry in ENTRIES.values()} - set(plans()) == set()


def test_every_plan_has_calls() -> None:
    assert set(plans()) - {entry.name for entry in PLAN_ENTRIES.values()} == set()


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
            ranks, key, marks=() if entry.name in SHORT.get(ranks, ()) else pytest.mark.long, id=f"{key}-{ranks}"
        )
        for ranks in (2, 4, 3)
        for key, entry in PLAN_ENTRIES.items()
        if entry.name in PLANNED
    ],
)
def test_ranks_give_what_the_class_gives(find: Callable[[str, int], Found], ranks: int, key: str) -> None:
    calls = find(PLAN_ENTRIES[key].name, ranks)[key]
    compared = 0
    for call, found in calls.items():
        if ranks > 2 and re.search("^PlanFault.*are fewer than", found["fault"]):
            continue  # the tiny model's text or image has too few tokens for so many ranks
        assert not found["fault"], call
        assert found["error"] <= TOLERANCE, call
        assert found["is_same_again"], call
        assert found["is_same_on_ranks"], call
        compared += 1
    assert compared
    if key in BUILDERS:
        assert len(calls) >= 1 + 2 * len(COUNTS)
