"""Wan 2.2 A14B through a real daemon with two workers: two transformers, and LoRAs of one of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wan_models

from xditd.client import BadRequest, LeaseLost

BAR = 1e-6
SIDES = {"height": 48, "width": 80, "frames": 9}
OPTIONS = {"boundary_ratio": 0.7, "guidance_scale_2": 3.0}


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SAMPLE = SimpleNamespace(
    config=wan_models.TEXT,
    scale=5.0,
    steps=6,
    options=OPTIONS,
    sides=SIDES,
    noise=drawn(1, 16, 3, 6, 10),
    conditioning={"prompt_embeds": drawn(1, 20, 48, seed=2), "negative_prompt_embeds": drawn(1, 20, 48, seed=3)},
)


def generate(client: Any, high: Any, low: Any) -> torch.Tensor:
    asked = {"steps": SAMPLE.steps, "guidance_scale": SAMPLE.scale, "options": OPTIONS, "noise": SAMPLE.noise, **SIDES}
    return client.generate(high, SAMPLE.conditioning, transformer_2=low, **asked).result().latents


def test_two_transformers_and_loras_of_the_second_give_what_the_pipeline_gives(client, relative_error):
    states = [wan_models.state_dict(seed) for seed in (0, 7)]
    high, low = (client.lend(state, label=label) for state, label in zip(states, ("high", "low"), strict=True))
    found = generate(client, high, low)
    references = [wan_models.reference(state) for state in states]
    assert relative_error(found, wan_models.pipeline_latents(*references, SAMPLE)) <= BAR

    layer = "blocks.1.self_attn.q"
    down, up = drawn(4, 256, seed=4) / 16, drawn(256, 4, seed=5) / 2
    lora = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    of_low = low.with_loras([(client.lend_lora(lora), 0.8)])
    merged = states[1] | {f"{layer}.weight": states[1][f"{layer}.weight"] + 0.8 * (up @ down)}
    expected = wan_models.pipeline_latents(references[0], wan_models.reference(merged), SAMPLE)
    assert relative_error(generate(client, high, of_low), expected) <= BAR
    assert relative_error(found, expected) > 100 * BAR
    assert torch.equal(generate(client, high, low), found)


def test_a_pair_that_does_not_fit_is_refused_by_name(client):
    high = client.lend(wan_models.state_dict(0))
    other = client.lend(wan_models.state_dict(0, wan_models.TI2V))
    with pytest.raises(BadRequest, match=r"transformer_2: a wan .* of other sizes or another dtype"):
        generate(client, high, other)
    low = client.lend(wan_models.state_dict(7))
    low.return_()
    with pytest.raises(LeaseLost, match="was returned; lend it again"):
        generate(client, high, low)
