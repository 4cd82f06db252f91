"""Qwen-Image in ComfyUI: masks, the VAE and refusals; stock's samplers are in ``test_family_parity``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_families import VARIANTS

from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-6
NAME = "qwen_image"
VARIANT = VARIANTS[NAME]


def test_masked_tokens_do_not_count(weightless, stock, ksample, relative_error):
    def text(seed: int) -> list[Any]:
        return VARIANT.text(seed, 33, attention_mask=(torch.arange(33)[None] < 20).long())

    latent = VARIANT.latent(2)
    ours, theirs = (ksample(model(NAME), text(1), text(2), latent, cfg=2.0) for model in (weightless, stock))
    assert relative_error(ours, theirs) <= 2 * TOLERANCE
    assert relative_error(theirs, ksample(stock(NAME), VARIANT.text(1, 33), text(2), latent, cfg=2.0)) > 1e-3


def test_several_frames_are_refused(weightless, ksample):
    with pytest.raises(Unsupported, match="latents of several frames"):
        ksample(weightless(NAME), VARIANT.text(1), VARIANT.text(2), VARIANT.latent(size=(2, 8, 8)))


def test_layered_is_refused_by_name(comfy, stock):
    from xditd.client.comfyui.families import adapter_of_model

    family = adapter_of_model(stock(NAME).model)
    assert family is not None
    config = stock(NAME).model.model_config
    family.check_config(config, "a file")
    changed = config.unet_config | {"use_additional_t_cond": True}
    with pytest.raises(Unsupported, match="a file: it is Qwen-Image-Layered"):
        family.check_config(SimpleNamespace(unet_config=changed), "a file")
