"""A program, not a test: split the rows of calls over two halves of gloo ranks, and write what each rank got.

    python calling_ranks.py OUT_FOLDER

The operations here double their rows, and note which: what a model computes is for other tests. Each rank writes
``rank<N>.safetensors`` with ``<case>/<part>/<row>`` tensors, and ``rank<N>.json`` with the rows that it ran.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from xditd.gpu_workers.parallel.layouts import ParallelLayout

CASES: dict[str, list[list[tuple[int, ...]]]] = {
    "equal parts": [[(3, 4)], [(3, 4)]],
    "unequal parts": [[(3, 4)], [(5, 2, 2)]],
    "the longer part first": [[(5, 2, 2)], [(3, 4)]],
    "unequal rows of one part": [[(2, 2), (7,), (3, 3)]],
    "a part that is cut": [[(2,)], [(2, 3), (2, 3), (4,)]],
    "fewer rows than halves": [[(6, 2)]],
    "a part without rows": [[(2,)], [], [(3,)]],
}
"""By name: the shapes of the rows of each part."""


def rows_of(case: str) -> list[list[torch.Tensor]]:
    """The rows of each part, no number twice, the same in every process."""
    first = 0
    parts = []
    for shapes in CASES[case]:
        rows = []
        for shape in shapes:
            row = torch.arange(float(torch.zeros(shape).numel())).view(shape) + first
            first += row.numel()
            rows.append(row)
        parts.append(rows)
    return parts


class Doubling:
    """What :func:`run_parts` asks of ``TransformerOperations``. ``ran`` are the rows, by their first numbers."""

    def __init__(self) -> None:
        self.ran: list[list[float]] = []

    def rows(self, inputs: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(row.shape) for row in inputs.arguments["x"])

    def take_rows(self, inputs: Any, rows: slice) -> Any:
        return SimpleNamespace(arguments={"x": inputs.arguments["x"][rows]}, controls=())

    def run(self, model: Any, inputs: Any, options: Any) -> list[torch.Tensor]:
        self.ran.append([float(row.flatten()[0]) for row in inputs.arguments["x"]])
        return [2 * row for row in inputs.arguments["x"]]


def run(case: str, layout: ParallelLayout) -> tuple[list[Any], list[list[float]]]:
    """Run a case as a call: the rows of each part, and what of them was run here."""
    from xditd.gpu_workers.models.calls import run_parts
    from xditd.gpu_workers.models.operations import CallOptions

    operations: Any = Doubling()
    model: Any = SimpleNamespace(layout=layout)
    parts: Any = [SimpleNamespace(arguments={"x": rows}, controls=()) for rows in rows_of(case)]
    return run_parts(model, operations, parts, CallOptions()), operations.ran


def run_rank(rank: int, folder: str) -> None:
    from safetensors.torch import save_file

    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees

    torch.set_num_threads(1)
    layout = xfuser_start.start(rank, 2, f"{folder}/store", torch.device("cpu"), Degrees(cfg=2))
    tensors, ran = {}, {}
    for case in CASES:
        found, ran[case] = run(case, layout)
        for part, rows in enumerate(found):
            tensors |= {f"{case}/{part}/{number}": row.clone() for number, row in enumerate(rows)}
    save_file(tensors, f"{folder}/rank{rank}.safetensors")
    Path(folder, f"rank{rank}.json").write_text(json.dumps(ran))
    xfuser_start.stop()


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    from forked_ranks import fork_ranks

    fork_ranks(run_rank, 2, sys.argv[1])
