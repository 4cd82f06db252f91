"""Qwen-Image's template is that of diffusers' pipeline."""

from __future__ import annotations

import torch

from xditd.client.families.qwen_image import (
    EDIT_PIXELS,
    EDIT_PLUS_PIXELS,
    EDIT_TEMPLATE,
    EDIT_TEMPLATE_TOKENS,
    TEMPLATE,
    TEMPLATE_TOKENS,
    condition_size,
    edit_templated,
    templated,
    without_template,
)

PARTS = {"vae": None, "text_encoder": None, "tokenizer": None, "transformer": None, "scheduler": None}


def test_the_template_is_the_pipelines():
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(**PARTS)
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == TEMPLATE_TOKENS
    assert templated("a cat") == TEMPLATE.format("a cat")
    assert "{a} {}" in templated("{a} {}")


def test_states_of_the_template_are_left_out():
    states = torch.randn(2, 40, 8)
    assert torch.equal(without_template(states), states[:, 34:])
    assert torch.equal(without_template(states, EDIT_TEMPLATE_TOKENS), states[:, 64:])


def test_the_templates_with_pictures_are_the_pipelines():
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

    plus = QwenImageEditPlusPipeline(processor=None, **PARTS)
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert (plus.prompt_template_encode, plus.prompt_template_encode_start_idx) == (EDIT_TEMPLATE, EDIT_TEMPLATE_TOKENS)
    two = EDIT_TEMPLATE.replace("{}", f"Picture 1: {picture}Picture 2: {picture}a {{cat}}")
    assert edit_templated("a {cat}", 2) == two
    edit = QwenImageEditPipeline(processor=None, **PARTS)
    assert edit.prompt_template_encode_start_idx == EDIT_TEMPLATE_TOKENS
    assert edit.prompt_template_encode.format("a cat") == edit_templated("a cat", is_numbered=False)


def test_pictures_are_resized_as_by_the_pipelines():
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    assert (plus.CONDITION_IMAGE_SIZE, plus.VAE_IMAGE_SIZE) == (EDIT_PLUS_PIXELS, EDIT_PIXELS)
    for size in ((1920, 1080), (333, 512), (1000, 1000), (64, 4096)):
        for pixels in (EDIT_PLUS_PIXELS, EDIT_PIXELS):
            assert condition_size(*size, pixels=pixels) == plus.calculate_dimensions(pixels, size[0] / size[1])
