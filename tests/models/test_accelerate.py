"""Pipelines of diffusers whose models run in the workers give what they give in this process."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from pipeline_entries import PIPELINES
from pipeline_entry import PipelineEntry
from refusals import LOCAL_MODELS, REFUSED_PIPELINES
from rounding import assert_rounding, disturbed
from running_daemon import RunningDaemon

from xditd.client import Unsupported, accelerate
from xditd.client.diffusers.code_origin import CodeRecord

_first = {entry.feature: entry.name for entry in reversed(PIPELINES.values())}


QUICK_ON_TWO = ("text-to-image", "kv-cache", "unet")
"""Features of the pipelines that two workers run in every test run; the others are tested with the long tests."""


def entries(features: Collection[str] = tuple(_first)) -> list[object]:
    """Return the pipelines; the first of each of these features is tested in every run."""
    quick = {_first[feature] for feature in features}
    return [
        pytest.param(entry, id=name, marks=() if name in quick else pytest.mark.long)
        for name, entry in PIPELINES.items()
    ]


HALVES = 2.5e-2
"""The bound in half precision."""


@pytest.fixture
def use_threads() -> Iterator[object]:
    """Set the number of threads of this process: sums over another number may differ in their last bits."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


def run_both(
    entry: PipelineEntry, daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the results of this process, and those with models in the workers, which have not run here."""
    expected = entry.run(entry.build())
    pipe = entry.build()
    names = [name for name in entry.components if name not in LOCAL_MODELS.get(entry.name, ())]
    before = {name: set(vars(getattr(pipe, name))) for name in names}
    with daemon.connect() as client, accelerate(pipe, components=names, client=client) as fast:
        with monkeypatch.context() as patch:
            # What this test does to the classes would be refused.
            patch.setattr(CodeRecord, "is_same", lambda _: True)
            patch.setattr(CodeRecord, "check", lambda _: None)
            for kind in {type(each) for name in names for each in models_of(getattr(pipe, name))}:
                forbid(kind.forward, patch)
            found = entry.run(pipe)
        assert all(fast.calls.values()), fast.calls
    for name in names:
        left = set(vars(getattr(pipe, name))) - before[name]
        assert not left & {"forward", "encode", "decode"}
    return found, expected


def largest_errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest relative errors of results in float32 and of others: 0 without any, NaN if one is."""
    errors = {True: [0.0], False: [0.0]}
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-6)
        errors[ours.dtype == torch.float32].append(float(error))
    return float(torch.tensor(errors[True]).max()), float(torch.tensor(errors[False]).max())


def run_disturbed(entry: PipelineEntry, seed: int) -> list[torch.Tensor]:
    """Return the results of this process if each result of a layer is wrong by up to its last bit."""
    pipe = entry.build()
    with disturbed((getattr(pipe, name) for name in entry.components), seed):
        return entry.run(pipe)


def models_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the models of a list of ControlNets, whose own forward adds up their results in this process."""
    return list(getattr(model, "nets", [model]))


def forbid(function: Any, patch: pytest.MonkeyPatch) -> None:
    """Let a function fail. It stays the same object with the same file: ``accelerate`` refuses functions of others."""
    inner = inspect.unwrap(function)
    code = _must_not_run.__code__.replace(
        co_filename=inner.__code__.co_filename,
        co_freevars=inner.__code__.co_freevars,
        co_name=inner.__code__.co_name,
        co_qualname=inner.__code__.co_qualname,
    )
    patch.setattr(inner, "__code__", code)


def _must_not_run(*_: object, **__: object) -> None:
    raise AssertionError("a model ran in this process")


def test_forbidden_function_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = PIPELINES["flux"]
    pipe = entry.build()
    with monkeypatch.context() as patch:
        forbid(type(pipe.transformer).forward, patch)
        with pytest.raises(AssertionError, match="a model ran in this process"):
            entry.run(pipe)
    entry.run(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("entry", entries())
def test_one_worker_gives_the_same_bits(
    entry: PipelineEntry, one_worker: RunningDaemon, use_threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(1)
    if entry.name in REFUSED_PIPELINES:
        with pytest.raises((Unsupported, ValueError), match=REFUSED_PIPELINES[entry.name].says):
            run_both(entry, one_worker, monkeypatch)
        return
    found, expected = run_both(entry, one_worker, monkeypatch)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("entry", entries(QUICK_ON_TWO))
def test_two_workers_give_the_same_to_1e_6(
    entry: PipelineEntry, two_workers: RunningDaemon, use_threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # as each worker has
    if entry.name in REFUSED_PIPELINES:
        pytest.skip("refused, as the test with one worker shows")
    found, expected = run_both(entry, two_workers, monkeypatch)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
    error, others = largest_errors(found, expected)
    assert others <= HALVES
    assert_rounding(error, lambda seed: largest_errors(run_disturbed(entry, seed), expected)[0])
