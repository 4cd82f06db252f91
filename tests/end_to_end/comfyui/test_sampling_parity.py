"""A remote MODEL gives the latents of the same ComfyUI running locally, through ComfyUI's own nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 2e-6

CASES = [
    dict(sampler_name="euler", scheduler="simple"),
    dict(sampler_name="euler", scheduler="normal", cfg=3.0),
    dict(sampler_name="euler_ancestral", scheduler="beta"),
    dict(sampler_name="dpmpp_2m", scheduler="karras"),
    dict(sampler_name="dpmpp_2m", scheduler="sgm_uniform", cfg=3.0, denoise=0.6),
    dict(sampler_name="dpmpp_2m_sde", scheduler="simple"),
    dict(sampler_name="uni_pc", scheduler="normal"),
    dict(sampler_name="res_multistep", scheduler="beta", cfg=3.0),
    dict(sampler_name="lcm", scheduler="sgm_uniform"),
    dict(sampler_name="euler", scheduler="simple", denoise=0.6, mask=True),
    dict(sampler_name="euler", scheduler="simple", batch=2),
    dict(sampler_name="euler", scheduler="simple", tokens=301),
    dict(sampler_name="euler", scheduler="simple", pixels=112),
    dict(sampler_name="euler", scheduler="simple", pixels=120),
    dict(sampler_name="euler", scheduler="simple", guidance=2.0, cfg=3.0),
    dict(sampler_name="euler", scheduler="simple", tokens=21, negative_tokens=16, cfg=3.0),
]


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) if isinstance(value, str) else f"{key}{value}" for key, value in case.items())


ZEROED = [
    "double_blocks.1.txt_attn.norm.key_norm.scale",
    "single_blocks.0.linear2.bias",
    "img_in.bias",
    "double_blocks.0.img_mod.lin.weight",
    "final_layer.adaLN_modulation.1.bias",
    "single_blocks.1.modulation.lin.bias",
    "vector_in.out_layer.bias",
]
"""Tensors that are zeroed one by one, to show that each comparison fails when it should."""


@pytest.fixture
def spoiled(connected, files, tmp_path) -> Callable[[int], Any]:
    """The remote model of the same checkpoint with one tensor zeroed."""
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    def load(which: int) -> Any:
        tensors = load_file(files.transformer)
        name = ZEROED[which % len(ZEROED)]
        save_file({**tensors, name: torch.zeros_like(tensors[name])}, tmp_path / "zeroed.safetensors")
        return load_unet(str(tmp_path / "zeroed.safetensors"))

    return load


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_stock_ksampler(case, comfy, remote, spoiled, local, conditioning, ksample, relative_error):
    options = dict(case)
    pixels, batch = options.pop("pixels", 128), options.pop("batch", 1)
    tokens, guidance = options.pop("tokens", 16), options.pop("guidance", None)
    positive = conditioning(1, tokens)
    if guidance is not None:
        positive = comfy.flux.FluxGuidance.execute(positive, guidance).result[0]
    negative = conditioning(2, options.pop("negative_tokens", tokens))
    latent: dict[str, Any] = {"samples": torch.zeros(batch, 16, pixels // 8, pixels // 8)}
    if "denoise" in options:
        latent["samples"] = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(5))
    if options.pop("mask", False):
        latent["noise_mask"] = torch.zeros(1, pixels, pixels)
        latent["noise_mask"][:, : pixels // 2] = 1.0
    expected = ksample(local, positive, negative, dict(latent), **options)
    actual = ksample(remote, positive, negative, dict(latent), **options)
    assert expected.std() > 0.1
    assert relative_error(actual, expected) <= TOLERANCE
    wrong = ksample(spoiled(CASES.index(case)), positive, negative, dict(latent), **options)
    assert relative_error(wrong, expected) > 10 * TOLERANCE


def test_sampler_custom_advanced(comfy, remote, spoiled, local, conditioning, relative_error):
    def run(model: Any) -> torch.Tensor:
        guider = comfy.custom.BasicGuider.execute(model, conditioning(1)).result[0]
        sigmas = comfy.custom.BasicScheduler.execute(model, "simple", 4, 1.0).result[0]
        sampler = comfy.custom.KSamplerSelect.execute("dpmpp_2m").result[0]
        noise = comfy.custom.RandomNoise.execute(7).result[0]
        latent = {"samples": torch.zeros(1, 16, 16, 16)}
        return comfy.custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]["samples"]

    expected = run(local)
    assert relative_error(run(remote), expected) <= TOLERANCE
    assert relative_error(run(spoiled(0)), expected) > 10 * TOLERANCE


def test_model_sampling_flux_works_on_the_model(comfy, remote, local, conditioning, ksample, relative_error):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    found = []
    for model in (remote, local):
        (patched,) = ModelSamplingFlux().patch(model, max_shift=1.15, base_shift=0.5, width=512, height=512)
        found.append(ksample(patched, conditioning(1), conditioning(2), latent))
    plain = ksample(local, conditioning(1), conditioning(2), latent)
    assert relative_error(*found) <= TOLERANCE
    assert relative_error(found[1], plain) > 1e-3
