"""Qwen2.5-VL as a text encoder: the key map of each naming, and the states of transformers' class for texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import qwen2_5_vl_models as models
import torch

from xditd.gpu_workers.families.qwen2_5_vl.checkpoint import Qwen25Vl, Qwen25VlConfig
from xditd.gpu_workers.families.qwen2_5_vl.config import VisionConfig
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, resolve
from xditd.ipc.errors import BadCheckpoint, UnknownFamily, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
BAR = 1e-6


def fitted(state: State) -> Resolution:
    given = {name: TensorInfo.of(tensor) for name, tensor in state.items()}
    return resolve(detect(given.keys()), given)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def encoded(model: CachedModel, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    operations: Any = model.operations
    states, pooled = operations.encode(model, ids, pooled=False, **more)
    assert pooled is None
    return states


@pytest.fixture
def model(shared_cache: ModelCache, plug: Plugger) -> CachedModel:
    return plug(shared_cache, models.state_dict(models.TEXT_ALONE)).model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(shape[-1]))


@pytest.mark.parametrize("naming", ["transformers", "comfyui", "bare"])
def test_every_element_is_that_of_the_class(naming: str) -> None:
    state = models.state_dict(naming=naming)
    found = fitted({**state, "lm_head.weight": torch.zeros(2, 2)})
    assert (found.family.name, found.config, found.skipped) == ("qwen2_5_vl", models.SMALL, ("lm_head.weight",))
    right = models.reference().state_dict()
    for target, part in found.key_map.items():
        name = target if target.startswith("visual.") else f"language_model.{target}"
        assert torch.equal(state[part.source][part.start : part.stop], right.pop(name)), target
    assert not right


def test_a_file_without_a_vision_tower_encodes_texts_alone(model: CachedModel) -> None:
    operations: Any = model.operations
    assert fitted(models.state_dict(models.TEXT_ALONE)).config == models.TEXT_ALONE == model.config
    facts = operations.facts(model.config)
    assert (facts.width, facts.layers, facts.images) == (128, 2, ())
    with_tower = operations.facts(models.SMALL)
    assert [each.name for each in with_tower.images if each.is_needed] == ["pixel_values", "image_grid_thw"]


@pytest.mark.parametrize("shape", [(1, 40), (2, 7), (1, 1)])
def test_states_are_those_of_the_pipelines(model: CachedModel, shape: tuple[int, int]) -> None:
    found = encoded(model, ids(*shape))
    with torch.no_grad():
        given = models.reference()(input_ids=ids(*shape), attention_mask=torch.ones(shape), output_hidden_states=True)
    assert error_of(found, given.hidden_states[-1]) <= BAR
    assert found.std() > 0.5


@pytest.mark.parametrize("padding", ["left", "right"])
def test_masks_and_layers(model: CachedModel, padding: str) -> None:
    given, mask = ids(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[0, slice(0, 4) if padding == "left" else slice(7, None)] = 0
    with torch.no_grad():
        right = models.reference()(input_ids=given, attention_mask=mask, output_hidden_states=True).hidden_states
    assert error_of(encoded(model, given, mask=mask), right[-1]) <= BAR
    assert error_of(encoded(model, given, mask=mask, layers=(0, 1)), torch.cat(right[:2], dim=-1)) <= BAR
    if padding == "left":
        assert error_of(encoded(model, given)[0, 4:], right[-1][0, 4:]) > 0.01


def test_weights_in_bfloat16_are_computed_in_float32(shared_cache: ModelCache, plug: Plugger) -> None:
    halves = {name: each.bfloat16() for name, each in models.state_dict(models.TEXT_ALONE).items()}
    expected = encoded(plug(shared_cache, {name: each.float() for name, each in halves.items()}).model, ids(1, 20))
    narrow = plug(shared_cache, halves).model
    assert narrow.dtype == torch.bfloat16
    found = encoded(narrow, ids(1, 20))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_faults_and_relatives_are_named() -> None:
    state = models.state_dict()
    for name in ("model.layers.1.self_attn.v_proj.bias", "visual.blocks.3.attn.qkv.weight"):
        lost = {other: each for other, each in state.items() if other != name}
        with pytest.raises(BadCheckpoint, match=f"1 missing: (model.)?{name}"):
            fitted(lost)
    with pytest.raises(BadCheckpoint, match=r"1 unexpected: visual\.blocks\.0\.norm1\.bias"):
        fitted(state | {"visual.blocks.0.norm1.bias": torch.zeros(160)})
    with pytest.raises(Unsupported, match="a vision tower of Qwen2-VL"):
        fitted(state | {"visual.blocks.0.mlp.fc1.weight": torch.zeros(160, 160)})
    odd = state | {"visual.patch_embed.proj.weight": torch.zeros(130, 3, 2, 14, 14)}
    with pytest.raises(BadCheckpoint, match=r"visual\.patch_embed\.proj\.weight is \[130, 3, 2, 14, 14\], expected"):
        fitted(odd)
    odd = state | {f"model.layers.{number}.self_attn.k_proj.weight": torch.zeros(100, 128) for number in range(2)}
    with pytest.raises(BadCheckpoint, match="128 rows of queries and 100 of keys are not of heads of 128"):
        fitted(odd)
    with pytest.raises(Unsupported, match=r"896 channels: Qwen2\.5 0\.5B, whose heads are of 64"):
        fitted(state | {"model.embed_tokens.weight": torch.zeros(200, 896)})
    without = [name for name in models.state_dict(naming="transformers") if not name.endswith("_proj.bias")]
    with pytest.raises(UnknownFamily):
        detect(without)


def test_sizes_of_the_released_model() -> None:
    config = Qwen25VlConfig(152064, 3584, 28, 28, 4, 18944, VisionConfig(1280, 32, 3420))
    given = {entry.source: TensorInfo("bfloat16", entry.shape) for entry in Qwen25Vl().entries(config, ())}
    found = resolve(detect(given.keys()), given)
    assert found.config == config
    billions = [sum(torch.Size(each.shape).numel() for each in given.values()) / 1e9]
    billions.append(sum(torch.Size(s.shape).numel() for name, s in given.items() if name.startswith("visual.")) / 1e9)
    assert [round(each, 2) for each in billions] == [7.75, 0.68]
