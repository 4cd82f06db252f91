"""The tiny pipelines are what the tests take them for: deterministic, finite, complete and small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from pipeline_entries import PIPELINES
from pipeline_entry import Feature, PipelineEntry


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads may differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("entry", PIPELINES.values(), ids=PIPELINES)
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


@pytest.mark.parametrize("entry", PIPELINES.values(), ids=PIPELINES)
def test_components_are_modules_with_weights(entry: PipelineEntry) -> None:
    pipe = entry.build()
    for name in entry.components:
        weights = list(getattr(pipe, name).parameters())
        assert weights
        assert all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)


def test_each_feature_has_a_pipeline() -> None:
    assert {entry.feature for entry in PIPELINES.values()} == set(get_args(Feature))
