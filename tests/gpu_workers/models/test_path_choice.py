"""What is captured of a forward, by what the host needs of its time: clocks and captures of a GPU are doubles here.

On a GPU ``test_captured_forward`` runs the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted_graphs import InterpretedGraphs

from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.path_choice import ForwardCase, LastRun, PathChooser
from xditd.gpu_workers.parallel.rank_sync import RankSet

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Event:
    """An event of a forward that took the GPU so many milliseconds."""

    def __init__(self, took_ms: float) -> None:
        self.took_ms = took_ms

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, _: Any) -> float:
        return self.took_ms


class Case:
    """A case of forwards that take 100 ms of the GPU, whose blocks are being compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()) for _ in range(2)]
        self.module: Any = torch.nn.Module()
        self.module.blocks = torch.nn.ModuleList(layers)
        self.module.forward = self.forward
        self.module.eval().requires_grad_(False)
        self.graphs = InterpretedGraphs(is_done=False)
        blocks = CompiledBlocks.of(self.module, None, self.graphs)
        assert isinstance(blocks, CompiledBlocks)
        self.blocks = blocks
        self.chooser = PathChooser(self.module, torch.device("cpu"), "auto", RankSet.GROUP, lambda: self.blocks)
        self.chooser.captures = self.chooser.compiles = self.chooser._measures_host = True
        self.captured: list[bool] = []
        monkeypatch.setattr(self.chooser, "_try_capture", self._capture)
        self.case = ForwardCase("key", False)
        self.case.awaits_blocks = True
        with torch.no_grad():
            self.result = self.blocks.begin("key", lambda: self.forward(X))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.module.blocks:
            x = block(x)
        return x

    def _capture(self, run: LastRun) -> tuple[Any, str]:
        self.captured.append(run.case.is_compiled)
        results = [self.forward(X)]
        return SimpleNamespace(replay_last=lambda: results[0], memory_bytes=0), ""

    def choose(self, host_ms: float | None) -> str:
        """Decide after another run, during which the host took so long, or its blocks were recorded."""
        events: Any = None if host_ms is None else (Event(100.0), Event(100.0))

        def forward(given: Any) -> Any:
            return self.forward(**given)

        run = LastRun(self.case, forward, forward, {"x": X}, self.result, {}, (host_ms or 0.0) / 1e3, events)
        with torch.no_grad():
            reason = self.chooser.choose(run).reason
        return f"{self.case.current_path}: {reason}"


def test_a_run_whose_blocks_were_recorded_says_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    assert case.choose(None).startswith("eager")
    assert not case.case.is_decided
    assert case.captured == []


def test_where_the_host_is_the_limit_the_eager_forward_is_captured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    case.choose(None)
    assert case.choose(95.0) == "captured: "
    assert not case.case.is_decided
    case.graphs.is_done = True
    assert case.choose(None) == "compiled, captured: "  # the last run was that of the graph
    assert case.case.is_decided
    assert case.captured == [False, True]


def test_elsewhere_it_waits_for_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    for _ in range(3):
        assert case.choose(50.0).startswith("eager")
        assert not case.case.is_decided
    case.graphs.is_done = True
    assert case.choose(50.0) == "compiled, captured: "
    assert case.captured == [True]


def test_a_forward_that_the_host_does_not_delay_is_compiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    case.choose(10.0)
    case.graphs.is_done = True
    assert case.choose(10.0) == "compiled: the host needs less than 30% of its time"
    assert case.case.is_decided
    assert case.captured == []
