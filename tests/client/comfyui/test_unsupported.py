"""Options that a remote forward cannot apply are named; known ones pass."""

from __future__ import annotations

from typing import Any

import pytest

from xditd.client import Unsupported
from xditd.client.comfyui.families.flux1 import Flux1Model
from xditd.client.comfyui.unsupported import (
    MODEL_OPTIONS,
    NODE_OPTIONS,
    RUN_OPTIONS,
    check_forward,
    condition_faults,
    model_option_faults,
)

GUIDED = Flux1Model(pooled_channels=768, has_guidance=True)


@pytest.mark.parametrize("name", sorted(RUN_OPTIONS | NODE_OPTIONS))
def test_a_transformer_option_that_is_understood(name):
    check_forward({name: object(), "patches": {}, "patches_replace": {}})


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ({"patches": {"double_block": [print]}}, {}, r"blocks \(double_block: print\)"),
        ({"patches_replace": {"dit": {("double_block", 0): print}}}, {}, r"replacement.*\(dit: print\)"),
        ({"optimized_attention_override": print}, {}, "attention override"),
        ({"rope_options": {"scale_x": 2.0}}, {}, "RoPE"),
        ({"what_a_pack_sets": 1}, {}, "'what_a_pack_sets'"),
        ({}, {"faults": ["what an adapter names"]}, "what an adapter names"),
    ],
)
def test_each_is_named(options, more, said):
    with pytest.raises(Unsupported, match=said):
        check_forward(options, **more)


@pytest.mark.parametrize("name", sorted(MODEL_OPTIONS - {"transformer_options"}))
def test_a_model_option_that_is_understood(name):
    assert list(model_option_faults({name: print, "transformer_options": {"sigmas": [1.0]}})) == []


def skip_layers(args: Any) -> Any:
    def inner() -> Any:
        return args["model_options"]["patches_replace"]

    return inner()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"what_a_pack_sets": print}, "'what_a_pack_sets' (print)"),
        ({"transformer_options": {"patches": {"post_input": [print]}}}, "post_input"),
        ({"sampler_post_cfg_function": [print, skip_layers]}, "other blocks (skip_layers of test_unsupported)"),
        ({"multigpu_clones": {"cuda:1": object()}}, "multigpu_clones"),
    ],
)
def test_a_model_option_that_is_not_understood(options, said):
    (fault,) = model_option_faults(options)
    assert said in fault


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"gligen": ("position", object(), [])}, "GLIGEN"),
        ({"hooks": object()}, "hooks of the kind 'object'"),
        ({"reference_latents": [object()], "reference_latents_method": "other"}, "by the method 'other'"),
        ({"attention_mask_img_shape": (8, 8)}, "Apply Style Model"),
        ({"guidance": None}, "FluxDisableGuidance"),
    ],
)
def test_conditioning_is_looked_at_whenever_it_begins(part, said):
    conditions = {"positive": [{"cross_attn": object()}, {**part, "start_percent": 0.6}], "negative": []}
    (fault,) = condition_faults(conditions, GUIDED)
    assert said in fault


def test_conditioning_that_is_understood():
    part = {"cross_attn": object(), "control": None, "hooks": None, "reference_latents": [], "guidance": 3.5, "area": 1}
    assert list(condition_faults({"positive": [part]}, GUIDED)) == []
    plain = Flux1Model(pooled_channels=768, has_guidance=False)
    assert list(condition_faults({"positive": [{"guidance": None}]}, plain)) == []
