"""A double of ``CompiledGraphs`` whose graphs torch runs operation by operation, without a compiler, at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from xditd.gpu_workers.models.block_graphs import BlockGraph
from xditd.gpu_workers.models.compiled_graphs import GraphState


class InterpretedGraphs:
    """``made`` are the graphs that were asked for, ``is_done`` whether they can be found already."""

    def __init__(self, *, is_done: bool = True) -> None:
        self.made: dict[str, GraphState] = {}
        self.is_done = is_done

    def make(self, graphs: Mapping[str, bytes]) -> None:
        for name, encoded in graphs.items():
            self.made.setdefault(name, GraphState("made", BlockGraph.decode(encoded).to_torch()))

    def find(self, name: str) -> GraphState | None:
        return self.made.get(name) if self.is_done else GraphState("making")

    def refuse(self, name: str, reason: str) -> None:
        self.made[name] = GraphState("failed", reason=reason)

    def run_instead(self, function: Callable) -> None:
        """Let a function run in place of every graph."""
        for name in self.made:
            self.made[name] = GraphState("made", function)
