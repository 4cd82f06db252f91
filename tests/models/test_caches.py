"""KV caches of transformers as arguments of accelerated models: filled, and the caller's own objects."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

from xditd.client import Client, accelerate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_many_threads_as_the_worker")]


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaModel(config).eval()


@torch.no_grad()
def run(model: Any, cache: Any) -> list[torch.Tensor]:
    tokens = torch.arange(6).reshape(1, 6)
    found = []
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        found.append(out.last_hidden_state)
    return [*found, *(torch.clone(tensor) for layer in cache.layers for tensor in (layer.keys, layer.values))]


@pytest.mark.parametrize("has_config", [True, False])
def test_cache_of_the_caller_is_filled_and_given_back(client: Client, has_config: bool) -> None:
    model = llama()
    config = model.config if has_config else None
    expected = run(copy.deepcopy(model), DynamicCache(config=config))
    with accelerate(model, client=client):
        found = run(model, DynamicCache(config=config))
    assert len(found) == len(expected) == 7
    assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))
