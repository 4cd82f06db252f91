"""Qwen-Image's template is that of diffusers' pipeline."""

from __future__ import annotations

import torch

from xditd.client.families.qwen_image import TEMPLATE, TEMPLATE_TOKENS, templated, without_template


def test_the_template_is_the_pipelines():
    from diffusers import QwenImagePipeline

    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "transformer": None, "scheduler": None}
    pipeline = QwenImagePipeline(**parts)
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == TEMPLATE_TOKENS
    assert templated("a cat") == TEMPLATE.format("a cat")
    assert "{a} {}" in templated("{a} {}")


def test_states_of_the_template_are_left_out():
    states = torch.randn(2, 40, 8)
    assert torch.equal(without_template(states), states[:, 34:])
