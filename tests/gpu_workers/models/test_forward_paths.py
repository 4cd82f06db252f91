"""Paths of forwards: which one is chosen, without a GPU and without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch

from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks, CompiledState
from xditd.gpu_workers.models.forward_paths import RUNS_BEFORE, ForwardPaths
from xditd.gpu_workers.models.split_checks import CaseKey


class Blocks(CompiledBlocks):
    """Blocks whose graphs are there at once; ``change`` is what they make of the result of the forward."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change
        self.runs = 0

    def begin(self, key: Hashable, call: Callable[[], Any]) -> Any:
        return call()

    def run(self, key: Hashable, call: Callable[[], Any]) -> Any:
        self.runs += 1
        return self.change(call())

    def state(self, key: Hashable) -> CompiledState:
        return CompiledState("made", graphs=1)


class Calls:
    """A module with its paths, as a job calls them."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.module = torch.nn.Linear(4, 4).eval()
        self.blocks = Blocks(change)
        self.paths = ForwardPaths(
            self.module, "Tested", torch.device("cpu"), "compiled", is_leader=True, blocks=lambda: self.blocks
        )
        self.paths.use_weights("a", dict(self.module.named_parameters()))

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        arguments = {"input": torch.ones(2, 4)}
        key = CaseKey.of("forward", None, arguments, 2)
        result: torch.Tensor = self.paths.run(key, arguments, self._forward, self._forward, on_all_ranks=False)
        return result

    def decide(self) -> list[tuple[str, str]]:
        for _ in range(RUNS_BEFORE):
            self.run()
        self.paths.decide()
        return [(each.path, each.detail) for each in self.paths.take_reports()]

    def _forward(self, arguments: Any) -> Any:
        return self.module(**arguments)


def without_memory(_: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize(
    ("change", "path", "why"),
    [
        (lambda result: result * (1 + 1e-7), "compiled", ""),
        (lambda result: result * 1.1, "eager", "compiled blocks give other results"),
        (lambda result: result[:1], "eager", "compiled blocks give other results"),
        (without_memory, "eager", "there is no memory to compare it"),
    ],
)
def test_compiled_blocks_are_used_if_their_results_are_those_of_the_eager_forward(
    change: Callable[[torch.Tensor], torch.Tensor], path: str, why: str
) -> None:
    calls = Calls(change)
    expected = calls.run()
    assert calls.decide() == [(path, why)]
    runs = calls.blocks.runs
    torch.testing.assert_close(calls.run(), expected, rtol=1e-6, atol=1e-6)
    assert calls.blocks.runs == runs + (path == "compiled")


def test_nothing_is_decided_by_the_runs_of_a_failed_job() -> None:
    calls = Calls(lambda result: result)
    for _ in range(RUNS_BEFORE):
        calls.run()
    calls.paths.drop_runs()
    calls.paths.decide()
    assert not calls.paths.take_reports()
    assert calls.decide() == [("compiled", "")]


def test_forwards_that_have_to_be_eager_are_reported_once_for_each_case() -> None:
    calls = Calls(lambda result: result)
    for rows in (2, 2, 3, 2):
        calls.paths.note_eager({"input": torch.ones(rows, 4), "mode": "read"}, "a cache is read")
    reports = calls.paths.take_reports()
    assert [(each.path, each.shapes, each.split, each.detail) for each in reports] == [
        ("eager", "[2, 4]", "tokens", "a cache is read"),
        ("eager", "[3, 4]", "tokens", "a cache is read"),
    ]
    calls.paths.use_weights("a", dict(calls.module.named_parameters()))
    calls.paths.note_eager({"input": torch.ones(2, 4), "mode": "read"}, "a cache is read")
    assert len(calls.paths.take_reports()) == 1  # of other weights
