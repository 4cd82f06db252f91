"""For programs beside tests: ranks on the CPU, forked where xfuser has been imported.

Importing is most of what a group's start costs, and with ``spawn`` every rank does it anew. Only on the CPU: a process
that has used CUDA cannot be forked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xditd.gpu_workers.process import lean_imports, xfuser_cpu


def import_xfuser() -> None:
    """Import what ranks would import one by one."""
    with xfuser_cpu.importable():
        lean_imports.import_xfuser()
        import xditd.gpu_workers.families.flux1.operations
        import xditd.gpu_workers.families.flux1.sequence_parallel  # noqa: F401


def fork_ranks(run_rank: Callable[..., None], ranks: int, *given: Any) -> None:
    """Run ``run_rank(rank, *given)`` in a process for each rank, and wait; raises what the first of them raised."""
    import_xfuser()
    torch.multiprocessing.start_processes(run_rank, given, nprocs=ranks, start_method="fork")
