"""Qwen2.5-VL as a text encoder: the key map of each naming, and the states of transformers' whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xditd.gpu_workers.families.qwen2_5_vl.checkpoint import Qwen25Vl, Qwen25VlConfig
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, resolve
from xditd.ipc.errors import BadCheckpoint, UnknownFamily, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
SMALL = Qwen25VlConfig(vocabulary=200, width=384, layers=3, heads=3, key_heads=1, inner=160)


@pytest.fixture(scope="module")
def reference() -> Any:
    """The model that diffusers' pipelines have, with a vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": SMALL.vocabulary,
        "hidden_size": SMALL.width,
        "intermediate_size": SMALL.inner,
        "num_hidden_layers": SMALL.layers,
        "num_attention_heads": SMALL.heads,
        "num_key_value_heads": SMALL.key_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": SMALL.width}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=197, video_token_id=198)
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape)
        else:
            parameter.data = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def state(reference: Any) -> State:
    return dict(reference.state_dict())


def fitted(state: State) -> Resolution:
    given = {name: TensorInfo.of(tensor) for name, tensor in state.items()}
    return resolve(detect(given.keys()), given)


def in_comfyuis_names(state: State) -> State:
    found = {name.replace("model.language_model.", "model."): each for name, each in state.items()}
    return {name.replace("model.visual.", "visual."): each for name, each in found.items()}


@pytest.mark.parametrize("naming", ["transformers", "comfyui", "bare"])
def test_every_element_is_that_of_the_class(state: State, naming: str) -> None:
    given = state if naming == "transformers" else in_comfyuis_names(state)
    if naming == "bare":
        given = {name: each for name, each in given.items() if not name.startswith(("visual.", "lm_head."))}
    found = fitted(given)
    assert (found.family.name, found.config) == ("qwen2_5_vl", SMALL)
    for target, part in found.key_map.items():
        right = state[f"model.language_model.{target}"]
        assert torch.equal(given[part.source][part.start : part.stop], right), target
    assert all("visual." in name or "lm_head" in name for name in found.skipped)
    assert len(found.key_map) + len(found.skipped) == len(given)


@pytest.mark.parametrize("shape", [(1, 40), (2, 7), (1, 1)])
def test_states_are_those_of_the_pipelines(
    shared_cache: ModelCache, plug: Plugger, reference: Any, state: State, shape: tuple[int, int]
) -> None:
    import direct_jobs

    ids = torch.randint(0, 190, shape, generator=torch.Generator().manual_seed(shape[1]))
    model = plug(shared_cache, in_comfyuis_names(state)).model
    found, pooled = direct_jobs.encode_text(model, ids)
    with torch.no_grad():
        given = reference(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    expected = given.hidden_states[-1]
    assert pooled is None
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-6
    assert found.std() > 0.5


def test_weights_in_bfloat16_are_computed_in_float32(
    shared_cache: ModelCache, plug: Plugger, reference: Any, state: State
) -> None:
    import direct_jobs

    halves = {name: each.bfloat16() for name, each in state.items()}
    wide = plug(shared_cache, {name: each.float() for name, each in halves.items()}).model
    ids = torch.randint(0, 190, (1, 20), generator=torch.Generator().manual_seed(1))
    expected, _ = direct_jobs.encode_text(wide, ids)
    narrow = plug(shared_cache, halves).model
    assert narrow.dtype == torch.bfloat16
    found, _ = direct_jobs.encode_text(narrow, ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_faults_and_relatives_are_named(state: State) -> None:
    lost = {name: each for name, each in state.items() if not name.endswith("layers.1.self_attn.v_proj.bias")}
    with pytest.raises(BadCheckpoint, match=r"1 missing: model\.layers\.1\.self_attn\.v_proj\.bias"):
        fitted(in_comfyuis_names(lost))
    odd = dict(state)
    for number in range(SMALL.layers):
        odd[f"model.language_model.layers.{number}.self_attn.k_proj.weight"] = torch.zeros(100, SMALL.width)
    with pytest.raises(BadCheckpoint, match="384 rows of queries and 100 of keys are not of heads of 128"):
        fitted(odd)
    smallest = state | {"model.language_model.embed_tokens.weight": torch.zeros(200, 896)}
    with pytest.raises(Unsupported, match=r"896 channels: Qwen2\.5 0\.5B, whose heads are of 64"):
        fitted(smallest)
    without = {name: each for name, each in state.items() if not name.endswith("_proj.bias")}
    with pytest.raises(UnknownFamily):
        detect(without.keys())


def test_sizes_of_the_released_model() -> None:
    config = Qwen25VlConfig(152064, 3584, 28, 28, 4, 18944)
    given = {entry.source: TensorInfo("bfloat16", entry.shape) for entry in Qwen25Vl().entries(config, ())}
    found = resolve(detect(given.keys()), given)
    assert found.config == config
    assert round(sum(torch.Size(each.shape).numel() for each in given.values()) / 1e9, 2) == 7.07
