"""A program, not a test: ranks on the CPU run the calls of classes with compiled blocks, and compare with eager ones.

    python compiled_ranks.py OUT.json RANKS FOLDER CLASS...

With several ranks, tokens are split by the classes' plans. Graphs are compiled in FOLDER; with ``-`` torch runs them
operation by operation, and more calls are run. Rank 0 writes, for each entry and call, what was found.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from class_entries import ENTRIES
from interpreted_graphs import InterpretedGraphs
from plan_cases import Case, cases_of, tensors_of
from planned_ranks import fork_ranks
from rounding import SEEDS, disturbed

from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import PlanFault, TokenPlan
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.plans import find

TIMEOUT = timedelta(minutes=40)
"""How long a rank waits for another that compiles."""


def run_rank(rank: int, ranks: int, out: str, folder: str, cases: dict[str, list[Case]]) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        store = dist.FileStore(f"{out}.store", ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    graphs: Any = InterpretedGraphs() if folder == "-" else CompiledGraphs(Path(folder), torch.device("cpu"))
    if isinstance(graphs, CompiledGraphs):
        graphs.let_load()  # as a rank does between commands
    found: dict[str, dict[str, Any]] = {}
    for key, calls in cases.items():
        plan = find(ENTRIES[key].name)
        planned = PlannedModule(calls[0].model, plan) if ranks > 1 and isinstance(plan, TokenPlan) else None
        if ranks > 1 and planned is None:
            continue
        found[key] = {}
        blocks = CompiledBlocks.of(calls[0].model, planned, graphs)
        for case in calls:
            found[key][case.name] = run_case(case, blocks, planned, Ranks(None, rank, ranks))
            print(rank, key, case.name, found[key][case.name], flush=True)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    if isinstance(graphs, CompiledGraphs):
        graphs.close()


@torch.inference_mode()
def run_case(case: Case, blocks: CompiledBlocks | str, planned: PlannedModule | None, ranks: Ranks) -> dict[str, Any]:
    """Return the error against the eager forward, and what became of the calls of blocks."""
    if isinstance(blocks, str):
        return {"reason": blocks}

    def call() -> Any:
        return case.call() if planned is None else planned.run(case.call, ranks)

    try:
        eager = tuple(tensors_of(call()))
    except PlanFault as fault:
        return {"reason": fault.detail}
    recorded = tuple(tensors_of(blocks.begin(case.name, call)))
    while blocks.state(case.name).phase == "making":
        time.sleep(0.05)
    if planned is not None:
        dist.barrier()
    before = blocks.compiled, blocks.eager
    compiled = tuple(tensors_of(blocks.run(case.name, call)))
    counts = blocks.compiled - before[0], blocks.eager - before[1]
    # One rank with compiled blocks, the others without.
    mixed = tuple(tensors_of(blocks.run(case.name, call) if ranks.rank == 0 else call()))
    after = tuple(tensors_of(call()))
    by_seed = []
    for seed in SEEDS:
        with disturbed([case.model], seed):
            by_seed.append(error(tuple(tensors_of(call())), eager))
    return {
        "reason": blocks.state(case.name).reason,
        "disturbed": by_seed,
        "error": max(error(compiled, eager), error(mixed, eager)),
        "compiled": counts[0],
        "eager": counts[1],
        "is_recorded_alike": all(torch.equal(mine, its) for mine, its in zip(recorded, eager, strict=True)),
        "is_eager_again": all(torch.equal(mine, its) for mine, its in zip(after, eager, strict=True)),
    }


def error(mine: tuple[torch.Tensor, ...], its: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, its, strict=True))


def main(out: str, ranks: str, folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    keys = [key for key, entry in ENTRIES.items() if not names or entry.name in names]
    with torch.inference_mode():
        cases = {}
        for key in keys:
            try:
                cases[key] = cases_of(ENTRIES[key], with_counts=folder == "-")
            except (ValueError, NotImplementedError) as fault:
                print(key, fault, file=sys.stderr)
    if ranks == "1":
        run_rank(0, 1, out, folder, cases)
    else:
        fork_ranks(run_rank, int(ranks), int(ranks), out, folder, cases)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
