"""What a remote forward cannot honour is named, and nothing else is refused."""

from __future__ import annotations

import pytest

from xditd.client import Unsupported
from xditd.client.comfyui.refusals import check_forward


def test_a_plain_forward_passes():
    check_forward({"patches": {}, "sample_sigmas": [1.0, 0.0], "wrappers": {"diffusion_model": {}}, "uuids": []})


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ({"patches": {"double_block": [print]}}, {}, r"blocks \(double_block\)"),
        ({"patches_replace": {"dit": {("double_block", 0): print}}}, {}, r"replacement.*\(dit\)"),
        ({"optimized_attention_override": print}, {}, "attention override"),
        ({"rope_options": {"scale_x": 2.0}}, {}, "RoPE"),
        ({}, {"control": {"input": []}}, "ControlNet"),
        ({}, {"ref_latents": []}, "Kontext"),
        ({}, {"attention_mask": object()}, "attention mask"),
    ],
)
def test_each_is_named(options, more, said):
    with pytest.raises(Unsupported, match=said):
        check_forward(options, **more)
