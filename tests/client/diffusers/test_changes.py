"""The comparison by identity finds whatever the complete description finds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from flux_pipelines import flux
from followed_changes import FOLLOWED, Followed, block_of
from refused_changes import REFUSED, Refused

from xditd.client import Unsupported
from xditd.client.diffusers.changes import Snapshot
from xditd.ipc.facts import METHODS

SEEN_ELSEWHERE = {"global hook", "mode of torch"}
"""Changes of this process, not of the module."""


@pytest.mark.parametrize("case", FOLLOWED, ids=lambda case: case.name)
def test_followed_change_is_found(case: Followed) -> None:
    pipe = case.build()
    snapshots = [Snapshot(getattr(pipe, name), METHODS) for name in case.components]
    for change in case.changes:
        change(pipe)
        assert_agree(snapshots, is_changed=case.name not in HARMLESS)
        snapshots = [Snapshot(getattr(pipe, name), METHODS) for name in case.components]


HARMLESS = {
    "hooks on the module",
    "processor of diffusers",
    "cache enabled and disabled",
    "gradient checkpointing",
    "blocks of a video",
}
"""Changes after which a description may be the same: no new loan is needed."""


def assert_agree(snapshots: list[Snapshot], *, is_changed: bool) -> None:
    fast = [each._record.is_same() for each in snapshots]
    described = [each.described_changes() for each in snapshots]
    for is_same, changes in zip(fast, described, strict=True):
        assert not (is_same and changes), changes
    if is_changed:
        assert any(described)


@pytest.mark.parametrize(
    "case", [each for each in REFUSED if each.name not in SEEN_ELSEWHERE], ids=lambda case: case.name
)
def test_refused_change_is_found(case: Refused) -> None:
    pipe = flux()
    snapshot = Snapshot(pipe.transformer, METHODS)
    undo = case.change(pipe)
    try:
        assert not snapshot._record.is_same()
        assert snapshot.described_changes()
    finally:
        undo()
    if case.name != "step cache":  # it leaves an attribute, which workers can have
        assert snapshot.changes() == []


def test_same_values_in_new_objects_are_no_change() -> None:
    pipe = flux()
    snapshot = Snapshot(pipe.transformer, METHODS)
    norm = block_of(pipe).norm1.norm
    norm.eps = float(str(norm.eps))
    assert not snapshot._record.is_same()
    assert snapshot.changes() == []
    assert snapshot._record.is_same()


def transpose(pipe: Any) -> None:
    weight = block_of(pipe).ff.net[2].weight
    weight.data = weight.data.t()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda pipe: block_of(pipe).register_buffer("more", torch.zeros(2)), "transformer_blocks.0"),
        (lambda pipe: setattr(block_of(pipe).attn, "heads", 4), "0.attn"),
        (lambda pipe: setattr(block_of(pipe).norm1.norm, "eps", 1e-5), "norm1.norm"),
        (lambda pipe: setattr(pipe.transformer.config, "patch_size", 2), "FluxTransformer2DModel"),
        (lambda pipe: block_of(pipe).ff.net[2].bias.data.zero_(), "ff.net.2.bias"),
        (transpose, "ff.net.2.weight"),
    ],
    ids=["buffer", "number", "small-number", "attribute-of-the-configuration", "zeroed", "transposed"],
)
def test_change_is_named(change: Any, named: str) -> None:
    pipe = flux()
    snapshot = Snapshot(pipe.transformer, METHODS)
    change(pipe)
    assert named in " ".join(snapshot.changes())


def test_code_of_a_function_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot(flux().transformer, METHODS)
    with monkeypatch.context() as patch:
        patch.setattr(FluxAttention.forward, "__code__", (lambda *_, **__: None).__code__)
        with pytest.raises(Unsupported, match=r"FluxAttention\.forward: its __code__ was replaced within"):
            snapshot.changes()
    assert snapshot.changes() == []


def test_check_of_a_large_model_is_fast() -> None:
    """FLUX.1 has 1,279 submodules and 1,160 tensors. The bound leaves room for a busy machine."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    assert len(list(model.modules())) > 1200
    snapshot = Snapshot(model, METHODS)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        assert snapshot.changes() == []
        times.append(time.perf_counter() - began)
    assert min(times) < 0.010
