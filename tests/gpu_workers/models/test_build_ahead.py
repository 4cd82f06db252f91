"""Models that are built before their weights are lent: the lend finds them, few of those that are never lent stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.client.outlines import outline_of
from xditd.gpu_workers.models.model_cache import MAX_AHEAD
from xditd.ipc.errors import UnknownFamily

if TYPE_CHECKING:
    from one_rank import OneRank

State = dict[str, torch.Tensor]


def state_of(single_blocks: int = 1) -> State:
    return flux1_state_dict(0, double_blocks=1, single_blocks=single_blocks)


def on_meta(state: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor.to("meta") for name, tensor in state.items()}


@pytest.mark.parametrize("announced", [lambda state: state, on_meta], ids=["weights", "meta"])
def test_a_lend_finds_the_model(rank: OneRank, announced: Callable[[State], State]) -> None:
    state = state_of()
    models = rank.components.models
    rank.components.build_ahead(outline_of(announced(state)))
    assert (models.built, models.reused, rank.components.weights_bytes) == (1, 0, 0)
    rank.components.build_ahead(outline_of(state))  # again: nothing is built
    rank.lend("a", state)
    assert (models.built, models.reused) == (1, 1)
    assert rank.components.get("a", "transformer").match.is_reused


def test_a_model_is_warmed_up_until_it_is_lent(rank: OneRank, monkeypatch: pytest.MonkeyPatch) -> None:
    from xditd.gpu_workers.models import model_warm_up
    from xditd.gpu_workers.models.cached_model import CachedModel

    state, warmed = state_of(), []
    assert not rank.components.build_ahead(outline_of(state))  # on a CPU
    monkeypatch.setattr(CachedModel, "warm_up_sizes", {"rows": 1})
    monkeypatch.setattr(model_warm_up, "_has_room", lambda *_: True)
    monkeypatch.setattr(model_warm_up, "warm_up", lambda match, *_: warmed.append(match.model))
    assert rank.components.build_ahead(outline_of(state))
    rank.components.warm_up(outline_of(state))
    rank.lend("a", state)
    rank.components.warm_up(outline_of(state))
    assert warmed == [rank.components.get("a", "transformer").match.model]


def test_a_file_is_announced_by_its_header(rank: OneRank, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "flux.safetensors"
    save_file(state_of(), path)
    rank.components.build_ahead(outline_of(path))
    rank.lend("a", path)
    assert rank.components.models.built == 1


def make_folder(folder: Path) -> dict[str, object]:
    """Save a small transformer; return its configuration."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=32,
        pooled_projection_dim=16, axes_dims_rope=(16, 56, 56), guidance_embeds=True,
    )  # fmt: skip
    module.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def test_a_configuration_is_announced_alone(rank: OneRank, tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    rank.components.build_ahead(outline_of(config, compute_dtype="float32"))
    caches = (rank.components.models, rank.components.class_models)
    built = [each.built for each in caches]
    assert sum(built) > 0
    rank.lend("a", tmp_path)
    assert [each.built for each in caches] == built


def test_a_model_of_a_configuration_is_warmed_up_with_the_weights_of_its_class(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xditd.gpu_workers.models import model_warm_up
    from xditd.gpu_workers.models.cached_model import CachedModel

    monkeypatch.setattr(CachedModel, "warm_up_sizes", {"rows": 1, "text_tokens": 6, "image_tokens": 16})
    monkeypatch.setattr(model_warm_up, "_has_room", lambda *_: True)
    outline = outline_of(make_folder(tmp_path), compute_dtype="float32")
    assert rank.components.build_ahead(outline)
    rank.components.warm_up(outline)
    assert not rank.components.build_ahead(outline)  # it has had weights


@pytest.mark.parametrize("is_config", [False, True], ids=["folder", "configuration"])
def test_a_folder_with_parts_that_its_class_keeps_in_float32_finds_the_model(
    rank: OneRank, tmp_path: Path, is_config: bool
) -> None:
    import wan_models

    state = wan_models.state_dict(0, dtype=torch.bfloat16)
    wan_models.reference(state).save_pretrained(tmp_path)
    announced = json.loads((tmp_path / "config.json").read_text()) if is_config else tmp_path
    rank.components.build_ahead(outline_of(announced))
    rank.lend("a", tmp_path)
    match = rank.components.get("a", "transformer").match
    assert match.is_reused
    assert match.converted
    rank.lend("b", state)  # the same tensors, as a program holds them
    assert not rank.components.get("b", "transformer").match.is_reused


def test_few_that_are_never_lent_stay(rank: OneRank) -> None:
    models = rank.components.models
    rank.components.build_ahead(outline_of(on_meta(state_of(1))))
    rank.lend("lent", state_of(1))
    for blocks in range(2, MAX_AHEAD + 5):
        rank.components.build_ahead(outline_of(on_meta(state_of(blocks))))
    assert len(models._models) == 1 + MAX_AHEAD
    assert len(models._resolutions) == 1 + MAX_AHEAD
    assert rank.components.get("lent", "transformer").is_loaded  # the one that is used is among them


def test_what_no_family_knows_is_refused(rank: OneRank) -> None:
    with pytest.raises(UnknownFamily):
        rank.components.build_ahead(outline_of({"strange.weight": torch.ones(2, device="meta")}))
