"""Qwen-Image in ComfyUI: masks, the VAE and refusals; stock's samplers are in ``test_family_parity``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_families import VARIANTS
from safetensors.torch import save_file

from xditd.gpu_workers.families.wan_vae.checkpoint import WanVae
from xditd.gpu_workers.families.wan_vae.config import WanVaeConfig
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


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen_image") / "vae.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for entry in WanVae().entries(WanVaeConfig(width=8), ("decoder.middle.0.residual.0.gamma",)):
        values = torch.randn(entry.shape, generator=generator)
        is_norm = entry.source.endswith("gamma")
        tensors[entry.source] = 1 + 0.1 * values if is_norm else values / max(1, values[0].numel()) ** 0.5
    save_file(tensors, path)
    return path


@torch.inference_mode()
def test_its_vae_decodes_and_encodes_as_stock_does(comfy, connected, vae_file, relative_error):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    stock, ours = comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(vae_file))), load_vae(str(vae_file))
    for shape in ((1, 16, 1, 9, 7), (3, 16, 1, 2, 4)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert relative_error(ours.decode(z), stock.decode(z)) <= 1e-5
    for sides in ((72, 64), (75, 91)):
        pixels = torch.rand(1, *sides, 3, generator=torch.Generator().manual_seed(2))
        expected, found = stock.encode(pixels), ours.encode(pixels)
        assert found.shape == expected.shape == (1, 16, 1, *(side // 8 for side in sides))
        assert relative_error(found, expected) <= 1e-5
    with pytest.raises(Unsupported, match="latents of 2 frames: this VAE runs single images in the workers"):
        ours.decode(torch.zeros(1, 16, 2, 4, 4))
    with pytest.raises(Unsupported, match="images of 5 frames"):
        ours.encode(torch.rand(5, 32, 32, 3))
