"""Which jobs run in the workers' loop, and the reasons that the others do not."""

from __future__ import annotations

from typing import Any

import pytest

from xditd.client.comfyui.families.flux1 import Flux1Model
from xditd.client.comfyui.loop_eligibility import why_stepwise

GUIDED, PLAIN_MODEL = (Flux1Model(pooled_channels=768, has_guidance=has_guidance) for has_guidance in (True, False))
TEXT: dict[str, Any] = {"cross_attn": object(), "pooled_output": object(), "guidance": 3.5}
PLAIN: dict[str, Any] = {
    "sampler": "euler",
    "cfg": 1.0,
    "has_mask": False,
    "sigmas": [1.0, 0.5, 0.0],
    "positive": [TEXT],
    "negative": [TEXT],
    "family": GUIDED,
    "model_change": None,
    "latent_shape": (1, 16, 16, 14),
    "pixels_per_latent": 8,
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"positive": [{"cross_attn": object()}]},
        {"positive": [{**TEXT, "area": None}]},
        {"negative": [TEXT, TEXT]},
        {"family": PLAIN_MODEL, "positive": [{**TEXT, "guidance": None}]},
        {"latent_shape": (64, 16, 16, 14)},
    ],
)
def test_the_plain_job_is_fused(changed):
    assert why_stepwise(**(PLAIN | changed)) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sampler": "dpmpp_2m"}, "dpmpp_2m"),
        ({"cfg": 2.5}, "cfg 2.5"),
        ({"has_mask": True}, "mask"),
        ({"sigmas": [1.0, 0.5]}, "to 0"),
        ({"sigmas": [1.5, 0.5, 0.0]}, "at most 1"),
        ({"sigmas": []}, "schedule"),
        ({"sigmas": [0.5, 0.5, 0.0]}, "step to step"),
        ({"sigmas": [1 - at / 1001 for at in range(1001)] + [0.0]}, "1001 steps"),
        ({"latent_shape": (1, 16, 15, 16)}, "multiples of 16"),
        ({"latent_shape": (1, 16, 1, 16, 16)}, "has frames"),
        ({"latent_shape": (65, 16, 16, 16)}, "a batch of 65"),
        ({"positive": [TEXT, TEXT]}, "2 parts"),
        ({"positive": [{**TEXT, "area": (1, 2, 3, 4)}]}, "positive conditioning has area"),
        ({"negative": [{**TEXT, "area": (1, 2, 3, 4)}]}, "negative conditioning has area"),
        ({"positive": [{**TEXT, "a_key_of_a_pack": object()}]}, "a_key_of_a_pack"),
        ({"positive": [{**TEXT, "model_conds": {"c_concat": object()}}]}, "c_concat"),
        ({"positive": [{**TEXT, "strength": 0.5}]}, "strength"),
        ({"positive": [{"pooled_output": object()}]}, "no text embeddings"),
        ({"positive": [{**TEXT, "guidance": None}]}, "FluxDisableGuidance"),
        ({"model_change": "teacache wraps the model"}, "teacache"),
    ],
)
def test_what_is_not_fused_is_explained(changed, said):
    reason = why_stepwise(**(PLAIN | changed))
    assert reason is not None
    assert said in reason
