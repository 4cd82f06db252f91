"""The tiny pipelines are what the tests take them for: deterministic, finite, complete and small."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pipeline_entries import PIPELINES
from pipeline_entry import Feature, PipelineEntry

pytestmark = pytest.mark.usefixtures("as_many_threads_as_the_worker")


some = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=name, marks=() if number % 8 == 0 else pytest.mark.long)
        for number, (name, entry) in enumerate(PIPELINES.items())
    ],
)
"""Every eighth pipeline in each test run, the others with the long tests."""


@some
def test_pipeline_is_deterministic_and_finite(entry: PipelineEntry) -> None:
    pipe, other = entry.build(), entry.build()
    first = entry.run(pipe)
    assert first
    for tensor in first:
        assert tensor.isfinite().all()
        assert tensor.numel() == 1 or tensor.unique().numel() > 8, "the result is nearly constant"
    for again in (entry.run(pipe), entry.run(other)):
        assert len(again) == len(first)
        for one, two in zip(first, again, strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


@some
def test_run_uses_each_component(entry: PipelineEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = entry.build()
    called = set()
    for name in entry.components:
        component = getattr(pipe, name)
        assert all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in component.parameters())
        for method in ("forward", "encode", "decode"):
            if hasattr(component, method):
                record_calls(monkeypatch, component, method, lambda name=name: called.add(name))
    entry.run(pipe)
    assert called == set(entry.components)


def record_calls(
    monkeypatch: pytest.MonkeyPatch, component: torch.nn.Module, method: str, record: Callable[[], None]
) -> None:
    original = getattr(component, method)

    @functools.wraps(original)
    def recording(*args: Any, **kwargs: Any) -> Any:
        record()
        return original(*args, **kwargs)

    monkeypatch.setattr(component, method, recording)


def test_each_feature_has_a_pipeline() -> None:
    assert {entry.feature for entry in PIPELINES.values()} == set(get_args(Feature))
