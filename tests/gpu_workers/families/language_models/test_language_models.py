"""Qwen3 and Mistral Small 3: recognition, hidden states of layers against transformers, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import language_models
import pytest
import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, resolve
from xditd.ipc.errors import BadCheckpoint, BadRequest, UnknownFamily, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
FAMILIES = list(language_models.FAMILIES)
BAR = 1e-5


def fitted(state: State) -> Resolution:
    return resolve(detect(state, "text_encoder"), {name: TensorInfo.of(tensor) for name, tensor in state.items()})


def error_of(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours.double() - right.double()).abs().max() / right.double().abs().max())


def ids(rows: int = 2, tokens: int = 11) -> torch.Tensor:
    return torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def encoded(model: CachedModel, token_ids: torch.Tensor, **more: Any) -> torch.Tensor:
    operations: Any = model.operations
    hidden, pooled = operations.encode(model, token_ids, pooled=False, **more)
    assert pooled is None
    return hidden


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str, shared_cache: ModelCache, plug: Plugger) -> CachedModel:
    return plug(shared_cache, language_models.state_dict(family, 0)).model


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_each_naming_is_one_configuration(family: str, prefix: str) -> None:
    state = language_models.state_dict(family, 0, prefix=prefix)
    others = {
        "lm_head.weight": torch.zeros(300, 192),
        "model.multi_modal_projector.linear_1.weight": torch.zeros(4, 4),
        "vision_tower.patch_conv.weight": torch.zeros(4, 3, 2, 2),
    }
    found = fitted(state | (others if prefix else {}))
    assert found.family.name == family
    assert found.config == language_models.CONFIGS[family]
    assert {part.source for part in found.key_map.values()} == set(state)


def test_full_sizes_are_those_of_the_released_models() -> None:
    for name, sizes, billions in (
        ("qwen3", (151_936, 2560, 36, 32, 8, 9728), 4.02),
        ("qwen3", (151_936, 4096, 36, 32, 8, 12_288), 7.57),
        ("mistral3", (131_072, 5120, 40, 32, 8, 32_768), 22.9),
    ):
        family = language_models.FAMILIES[name]
        fields = ("vocabulary", "width", "layers", "heads", "key_heads", "inner")
        config = replace(language_models.CONFIGS[name], **dict(zip(fields, sizes, strict=True)))
        entries = list(family.entries(config, ()))
        assert family.configure({entry.source: entry.shape for entry in entries}) == config
        assert sum(torch.Size(entry.shape).numel() for entry in entries) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("padding", ["left", "right", None])
def test_states_of_layers_are_those_of_transformers(family: str, model: CachedModel, padding: str | None) -> None:
    token_ids, mask = ids(), torch.ones(2, 11, dtype=torch.int64)
    if padding == "left":
        mask[0, :4] = 0
    elif padding == "right":
        mask[1, 6:] = 0
    given = None if padding is None else mask
    with torch.no_grad():
        expected = language_models.reference(family, 0)(
            input_ids=token_ids, attention_mask=given, output_hidden_states=True, use_cache=False
        ).hidden_states
    found = encoded(model, token_ids, mask=given, layers=(1, 2, 3))
    # As Flux2Pipeline stacks them.
    stacked = torch.stack([expected[k] for k in (1, 2, 3)], dim=1).permute(0, 2, 1, 3).reshape(2, 11, -1)
    assert error_of(found, stacked) <= BAR
    assert error_of(encoded(model, token_ids, mask=given), expected[-1]) <= BAR
    assert error_of(encoded(model, token_ids, mask=given, layers=(0,)), expected[0]) <= BAR


def test_the_state_after_the_last_layer_is_not_normalised(family: str, model: CachedModel) -> None:
    raw = encoded(model, ids(), layers=(4,))
    normalised = encoded(model, ids())
    root = (raw.double().pow(2).mean(-1, keepdim=True) + model.config.epsilon).sqrt()
    weight = language_models.state_dict(family, 0)["model.norm.weight"]
    assert error_of((raw / root * weight).float(), normalised) <= BAR
    assert error_of(raw, normalised) > 0.1


def test_a_file_of_the_first_layers_alone(cache: ModelCache, plug: Plugger, model: CachedModel, family: str) -> None:
    state = language_models.state_dict(family, 0)
    first = {name: each for name, each in state.items() if ".layers.3." not in name and name != "model.norm.weight"}
    if family == "qwen3":
        with pytest.raises(BadCheckpoint, match=r"1 missing: (model\.)?norm\.weight"):
            fitted(first)
        return
    pruned = plug(cache, first).model
    assert error_of(encoded(pruned, ids(), layers=(1, 3)), encoded(model, ids(), layers=(1, 3))) <= BAR
    with pytest.raises(BadRequest, match="the file holds the first 3 layers alone"):
        encoded(pruned, ids())


def test_weights_in_bfloat16_compute_in_float32(cache: ModelCache, plug: Plugger, family: str) -> None:
    rounded = language_models.state_dict(family, 0, dtype=torch.bfloat16)
    exact = plug(cache, {name: tensor.float() for name, tensor in rounded.items()}).model
    expected = encoded(exact, ids(), layers=(2,))
    found = encoded(plug(cache, rounded).model, ids(), layers=(2,))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_every_tensor_shows(cache: ModelCache, plug: Plugger, family: str) -> None:
    state = language_models.state_dict(family, 0)
    right = encoded(plug(cache, state).model, ids())
    for name, tensor in state.items():
        changed = encoded(plug(cache, {**state, name: torch.zeros_like(tensor)}).model, ids())
        assert error_of(changed, right) > 10 * BAR, name


def test_what_clients_are_told(model: CachedModel) -> None:
    operations: Any = model.operations
    facts = operations.facts(model.config)
    assert (facts.width, facts.layers, facts.has_pooled) == (192, 4, False)
    assert operations.vocabulary(model.config) == 300


def test_relatives_are_not_taken_for_it() -> None:
    state = language_models.state_dict("qwen3", 0, prefix="")
    for more in ("visual.patch_embed.proj.weight", "layers.0.pre_feedforward_layernorm.weight"):
        with pytest.raises(UnknownFamily):
            detect({**state, more: torch.zeros(1)})
    with_bias = {**language_models.state_dict("mistral3", 0), "model.layers.0.self_attn.q_proj.bias": torch.zeros(256)}
    family = language_models.FAMILIES["mistral3"]
    assert not family.claims(with_bias)
    for width, says in ((256, "Llama or an older Mistral"), (3072, "Ministral 3, whose rotary embedding differs")):
        config = replace(language_models.CONFIGS["mistral3"], width=width)
        with pytest.raises(Unsupported, match=says):
            family.configure({entry.source: entry.shape for entry in family.entries(config, ())})


def test_faults_are_named_as_the_file_spells_them(family: str) -> None:
    state = language_models.state_dict(family, 0)
    del state["model.layers.2.mlp.up_proj.weight"]
    state["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(256, 192)
    state["model.layers.1.extra"] = torch.zeros(1)
    with pytest.raises(BadCheckpoint) as caught:
        fitted(state)
    assert "1 missing: model.layers.2.mlp.up_proj.weight" in caught.value.detail
    assert "1 unexpected: model.layers.1.extra" in caught.value.detail
    assert "model.layers.1.self_attn.v_proj.weight is [256, 192], expected [128, 192]" in caught.value.detail
