"""Paths of forwards, without a compiler and without GPUs: when they are decided, and what this leaves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_ranks import import_xfuser
from interpreted_graphs import InterpretedGraphs

from xditd.gpu_workers.models import forward_paths
from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks, find_compiled_blocks
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.split_checks import CaseKey
from xditd.ipc.errors import BadRequest, OutOfMemory

SIZE = 8


class Model(torch.nn.Module):
    """``count`` changes in each forward if it ``counts``."""

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__()
        blocks = [torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), torch.nn.SiLU()) for _ in range(2)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.counts, self.count = counts, 0
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += self.counts
        for block in self.blocks:
            x = block(x)
        return x + self.count


class Calls:
    """A module with its paths, as a job calls them on one rank."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.blocks = CompiledBlocks.of(module, None, InterpretedGraphs())
        cpu = torch.device("cpu")
        self.paths = ForwardPaths(module, "Tested", cpu, "compiled", is_leader=True, blocks=lambda: self.blocks)
        self.paths.use_weights("a", dict(module.named_parameters()))

    @torch.no_grad()
    def run(self, seed: int = 0, forward: Any = None) -> torch.Tensor:
        arguments = {"x": torch.randn(3, SIZE, generator=torch.Generator().manual_seed(seed))}
        forward = forward or (lambda given: self.module(**given))
        found: torch.Tensor = self.paths.run(
            CaseKey.of("forward", None, arguments, 3), arguments, forward, forward, on_all_ranks=False
        )
        self.paths.decide()
        return found

    def path(self) -> str | None:
        return reports[-1].path if (reports := self.paths.take_reports()) else None


def test_a_forward_with_other_values_is_the_same_case() -> None:
    """Also of tensors on the CPU, where the module is: they are no part of what is kept of a case."""
    calls = Calls(Model())
    for seed in range(4):
        torch.testing.assert_close(calls.run(seed), calls.module(torch.randn(3, SIZE, generator=seeded(seed))))
    assert calls.path() == "compiled"
    assert isinstance(calls.blocks, CompiledBlocks)
    assert calls.blocks.compiled == 2 * 3, "one to compare, two of calls"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_forward_that_changes_the_module_runs_once_for_each_call() -> None:
    calls = Calls(Model(counts=True))
    for number in range(6):
        calls.run()
        assert calls.module.count == number + 1
    (report,) = calls.paths.take_reports()
    assert (report.path, "change the module" in report.detail) == ("eager", True)


def test_without_room_for_copies_a_forward_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(forward_paths, "map_tensors", full)
    calls = Calls(Model())
    for _ in range(6):
        calls.run()
    (report,) = calls.paths.take_reports()
    assert (report.path, "no memory to compare" in report.detail) == ("eager", True)


def test_a_forward_that_fails_when_it_is_compared_stays_eager() -> None:
    calls = Calls(Model())
    runs = []

    def forward(given: Mapping[str, Any], error: Exception) -> Any:
        runs.append(given)
        if len(runs) == 3:
            raise error
        return calls.module(**given)

    for error in (OutOfMemory("no room"), torch.OutOfMemoryError("no room")):
        calls, runs[:] = Calls(Model()), []
        for _ in range(4):
            calls.run(forward=partial(forward, error=error))
        assert calls.path() == "eager"
        assert len(runs) == 5


def test_a_job_that_fails_leaves_nothing_to_decide() -> None:
    """The command after it may be any: ranks that have failed elsewhere do not have the same runs."""
    import_xfuser()
    from xditd.gpu_workers.process.torch_executor import TorchExecutor

    dropped: list[str] = []

    def fails(*_: Any) -> Any:
        dropped.append("job")
        raise BadRequest("refused")

    executor: Any = object.__new__(TorchExecutor)
    executor.facts = SimpleNamespace(rank=0)
    executor._layout = SimpleNamespace(device=torch.device("cpu"))
    paths = SimpleNamespace(drop_runs=lambda: dropped.append("runs"))
    executor._components = SimpleNamespace(
        models=SimpleNamespace(paths=[paths]), class_models=SimpleNamespace(paths=[paths])
    )
    executor._jobs = SimpleNamespace(run=fails)
    channel: Any = SimpleNamespace(is_cancelled=None, report_step=None, report_frames=None)
    with pytest.raises(BadRequest):
        executor.run(SimpleNamespace(job=None, exporter=None), channel)
    assert dropped == ["job", "runs", "runs"]


@pytest.mark.parametrize("error", [PermissionError("not writable"), RuntimeError("no home"), OSError("disk full")])
def test_without_a_folder_for_graphs_nothing_is_compiled(error: Exception) -> None:
    def fails() -> Any:
        raise error

    found = find_compiled_blocks(Model(), "none", fails)
    assert isinstance(found, str)
    assert str(error) in found
