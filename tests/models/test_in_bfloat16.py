"""Classes and accelerated pipelines in bfloat16: the bits of this process."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from class_entries import ENTRIES
from class_entry import ClassEntry, Random
from nested_values import cast, tensors_of
from pipeline_entries import PIPELINES
from pipeline_entry import PipelineEntry
from refusals import REFUSED_CALLS, REFUSED_PIPELINES

from xditd.client import Client, accelerate
from xditd.gpu_workers.process.cpu_convolutions import slow_dtypes

NOT_IN_BFLOAT16 = {
    "Flux2Transformer2DModel-kv_cached",
    "GlmImageTransformer2DModel-kv_read",
    "Kandinsky5Transformer3DModel",
    "QwenImage21Transformer2DModel-kv_cached",
    "SanaWMTransformer3DModel",
    "flux-from-pipe",
    "flux-to-bfloat16",
}
"""Those that this process cannot run: their caches, products or earlier calls have float32."""
OTHERS = {"WanAnimate2Transformer3DModel-kv_cached"} | NOT_IN_BFLOAT16 | REFUSED_CALLS.keys() | REFUSED_PIPELINES.keys()
CONVOLVING = {
    "AceStepTransformer1DModel", "ace-step", "stable-diffusion-xl-half-precision", "stable-video-diffusion",
}  # fmt: skip
"""Those with convolutions of which workers on some processors round the last bits otherwise."""
QUICK = {"QwenImageTransformer2DModel", "WanTransformer3DModel", "flux-ip-adapter", "sd3-controlnet"}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_many_threads_as_the_worker")]


def cases(known: dict[str, Any]) -> list[Any]:
    """Return a few for each test run, and the others for the long tests."""
    differs = pytest.mark.skipif(
        torch.bfloat16 in slow_dtypes(), reason="workers on this processor convolve in float32"
    )
    found = []
    for name in (each for each in known if each not in OTHERS):
        marks = [] if name in QUICK else [pytest.mark.long]
        found.append(pytest.param(known[name], id=name, marks=[*marks, differs] if name in CONVOLVING else marks))
    return found


def assert_same(found: Any, expected: Any) -> None:
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert pairs
    for mine, its in pairs:
        assert mine.dtype == its.dtype
        assert torch.equal(mine.nan_to_num(), its.nan_to_num())


@pytest.mark.parametrize("entry", cases(ENTRIES))
@torch.no_grad()
def test_class(client: Client, entry: ClassEntry) -> None:
    model = entry.build().bfloat16()
    ours, theirs = (cast(entry.arguments(Random(1)), torch.bfloat16) for _ in range(2))
    with client.lend(model, as_class=True) as loan:
        found = client.call(loan, ours)
        assert_same(found, model(**theirs))


@pytest.mark.parametrize("entry", cases(PIPELINES))
def test_pipeline(client: Client, entry: PipelineEntry) -> None:
    here, there = (in_bfloat16(entry.build()) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's of a second adapter
        right = entry.run(here)
        with accelerate(there, client=client):
            assert_same(entry.run(there), right)


def in_bfloat16(pipe: Any) -> Any:
    """Return a pipeline whose modules are bfloat16, and whose calls cast the tensors that they are given."""
    for each in pipe.components.values():
        if isinstance(each, torch.nn.Module):
            each.to(torch.bfloat16)
    kind = type(pipe)

    def call(self: Any, *given: Any, **named: Any) -> Any:
        return kind.__call__(self, *cast(given, torch.bfloat16), **cast(named, torch.bfloat16))

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return pipe
