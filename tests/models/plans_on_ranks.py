"""A program, not a test: ranks on the CPU run the calls of classes by their token plans.

python plans_on_ranks.py FOLDER RANKS CLASS...

It writes ``ranks<N>.json``: for each entry, for each of its calls, what was found.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from plan_cases import PLAN_ENTRIES, Case, cases_of
from planned_ranks import fork_ranks, run_case, start_rank

from xditd.gpu_workers.models.token_plans import TokenPlan
from xditd.gpu_workers.plans import find

Cases = dict[str, tuple[TokenPlan, list[Case]]]


def run_rank(rank: int, ranks: int, folder: str, cases: Cases) -> None:
    start_rank(rank, ranks, f"{folder}/store{ranks}")
    found = {key: {case.name: asdict(run_case(case, plan)) for case in calls} for key, (plan, calls) in cases.items()}
    if rank == 0:
        Path(folder, f"ranks{ranks}.json").write_text(json.dumps(found))


def main(folder: str, count: str, *classes: str) -> None:
    torch.set_num_threads(1)
    cases: Cases = {}
    for key, entry in PLAN_ENTRIES.items():
        plan = find(entry.name)
        if entry.name in classes and isinstance(plan, TokenPlan):
            cases[key] = plan, cases_of(entry)
    ranks = int(count)
    fork_ranks(run_rank, ranks, ranks, folder, cases)


if __name__ == "__main__":
    main(*sys.argv[1:])
