"""Which jobs run whole in the workers, and what is said about the others."""

from __future__ import annotations

from typing import Any

import pytest

from xditd.client.comfyui.fusion import why_stepwise

PLAIN: dict[str, Any] = {
    "sampler": "euler",
    "cfg": 1.0,
    "has_mask": False,
    "sigmas": [1.0, 0.5, 0.0],
    "conditions": [{"pooled_output": object(), "guidance": 3.5}],
    "model_options": {"transformer_options": {}},
    "foreign_wrappers": [],
    "latent_sides": (16, 14),
}


def test_the_plain_job_is_fused():
    assert why_stepwise(**PLAIN) is None


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
        ({"latent_sides": (15, 16)}, "multiples of 16"),
        ({"conditions": [{}, {}]}, "2 parts"),
        ({"conditions": [{"area": (1, 2, 3, 4)}]}, "area"),
        ({"conditions": [{"control": object()}]}, "control"),
        ({"conditions": [{"strength": 0.5}]}, "strength"),
        ({"model_options": {"sampler_post_cfg_function": [object()]}}, "post-CFG"),
        ({"foreign_wrappers": ["teacache"]}, "teacache"),
    ],
)
def test_what_is_not_fused_is_explained(changed, said):
    reason = why_stepwise(**(PLAIN | changed))
    assert reason is not None
    assert said in reason
