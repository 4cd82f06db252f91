"""A program, not a test: ranks on the CPU run the calls of classes by token plans with one wrong declaration.

python mutated_plans.py FOLDER CLASS...

It writes ``found.json``: by class, each mutation with the call that shows it, or ``null``. Mutations of the order of
streams are left out where no call of the class has a mask over all tokens of several streams.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from plan_cases import PLAN_ENTRIES, Case, cases_of
from plan_mutations import ORDER, mutations
from planned_ranks import fork_ranks, run_case, start_rank

from xditd.gpu_workers.models import forward_state
from xditd.gpu_workers.models.token_plans import TokenPlan
from xditd.gpu_workers.plans import find

RANKS = 3
"""The tokens of most calls do not divide by it."""
TOLERANCE = 1e-6


@contextmanager
def masks_seen(found: list[bool]) -> Iterator[None]:
    """Note for each attention whether it has a mask over all tokens of several streams."""
    attend = forward_state.attend

    def noting(query: Any, key: Any, value: Any, mask: Any, queries: Any, keys: Any, *rest: Any) -> Any:
        of_several = [
            mask is not None and tokens is not None and len(tokens.streams) > 1 and mask.shape[dim] == tokens.total
            for dim, tokens in ((-2, queries), (-1, keys))
            if mask is None or mask.ndim > 1
        ]
        found.append(any(of_several))
        return attend(query, key, value, mask, queries, keys, *rest)

    forward_state.attend = noting
    try:
        yield
    finally:
        forward_state.attend = attend


def run_class(plan: TokenPlan, cases: list[Case]) -> dict[str, str | None]:
    """Run calls by wrong plans: those that the plan itself makes right, each wrong plan until a call shows it."""
    masks: list[bool] = []
    with masks_seen(masks):
        found = [run_case(case, plan, runs=1) for case in cases]
    right = [case for case, each in zip(cases, found, strict=True) if not each.fault and each.error <= TOLERANCE]
    results: dict[str, str | None] = {}
    for what, wrong in mutations(plan).items():
        if ORDER not in what or any(masks):
            results[what] = shown_by(wrong, right)
    return results


def shown_by(wrong: TokenPlan, cases: list[Case]) -> str | None:
    for case in cases:
        found = run_case(case, wrong, runs=1)
        if found.fault or not found.error <= TOLERANCE:
            return f"{case.name}: {found.fault or found.error}"
    return None


def run_rank(rank: int, folder: str, classes: dict[str, tuple[TokenPlan, list[Case]]]) -> None:
    start_rank(rank, RANKS, f"{folder}/store")
    found = {}
    for name, (plan, cases) in classes.items():
        found[name] = run_class(plan, cases)
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found))


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    classes: dict[str, tuple[TokenPlan, list[Case]]] = {}
    for name in names:
        plan = find(name)
        if isinstance(plan, TokenPlan):
            cases = [case for entry in PLAN_ENTRIES.values() if entry.name == name for case in cases_of(entry)]
            classes[name] = plan, cases
    fork_ranks(run_rank, RANKS, folder, classes)


if __name__ == "__main__":
    main(*sys.argv[1:])
