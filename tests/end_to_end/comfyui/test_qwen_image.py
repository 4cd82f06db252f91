"""Qwen-Image in ComfyUI: masks, the workers' loop and refusals; stock's samplers are in ``test_family_parity``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wan_vaes
from comfyui_families import VARIANTS
from safetensors.torch import save_file

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


LOOPS: dict[str, dict[str, Any]] = {
    "text": {},
    "mask": {"attention_mask": (torch.arange(21)[None] < 13).long()},
    "references": VARIANT.references((6, 10), (9, 7)),
}


@pytest.mark.parametrize("given", LOOPS)
@pytest.mark.parametrize("name", [NAME, "qwen_image_edit_2511"])
def test_the_workers_loop_is_comfyuis(name, given, weightless, stock, ksample, xsample, relative_error):
    positive, negative = (VARIANT.text(seed, 21, **LOOPS[given]) for seed in (1, 2))
    latent = VARIANT.latent(2, (10, 16), seed=5)
    asked = {"positive": positive, "negative": negative, "latent_image": latent, "denoise": 0.8}
    ours, _, note = xsample(weightless(name), **asked)
    assert note.startswith("fused: 4 steps in the workers")
    theirs = ksample(stock(name), positive, negative, latent, denoise=0.8)
    assert ours.shape == theirs.shape == (2, 16, 1, 10, 16)
    assert relative_error(ours, theirs) <= TOLERANCE
    if given != "text":
        assert relative_error(ksample(stock(name), VARIANT.text(1, 21), negative, latent, denoise=0.8), theirs) > 1e-3


def test_the_loop_decodes_and_shows_previews(
    comfy, weightless, stock, tmp_path, xsample, ksample, monkeypatch, relative_error
):
    import latent_preview

    from xditd.client.comfyui.nodes.vae_loader import load_vae

    vae_file = tmp_path / "vae.safetensors"
    save_file(wan_vaes.state_dict(config=wan_vaes.SMALL), vae_file)
    shapes = []
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: object())
    monkeypatch.setattr(
        latent_preview, "prepare_callback", lambda *_: lambda step, x0, x, total: shapes.append((x0.shape, x.shape))
    )
    texts, latent = (VARIANT.text(1), VARIANT.text(2)), VARIANT.latent()
    samples, image, note = xsample(
        weightless(NAME), positive=texts[0], negative=texts[1], latent_image=latent, vae=load_vae(str(vae_file))
    )
    assert note == "fused: 4 steps in the workers"
    assert shapes == [(samples.shape, samples.shape)] * 4
    stock_vae = comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(vae_file)))
    assert relative_error(image, stock_vae.decode(ksample(stock(NAME), *texts, latent)).squeeze(1)) <= 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention_mask": torch.ones(1, 16)}, "an attention mask of weights"),
        ({"reference_latents": [torch.zeros(2, 16, 1, 4, 4)]}, "references that differ from image to image"),
        ({"reference_latents": [torch.zeros(1, 16, 2, 4, 4)]}, "references of several frames"),
        ({"reference_latents": [torch.zeros(1, 16, 1, 4, 4)], "reference_latents_method": "uxo"}, "method 'uxo'"),
    ],
)
def test_what_the_loop_cannot_pass_on_runs_step_by_step(change, says):
    from xditd.client.comfyui.families.qwen_image import QwenImageModel
    from xditd.client.comfyui.loop_eligibility import why_stepwise

    def reason(**more: Any) -> str | None:
        return why_stepwise(
            sampler="euler",
            cfg=1.0,
            has_mask=False,
            sigmas=[1.0, 0.0],
            positive=[{"cross_attn": object(), **more}],
            negative=[],
            family=QwenImageModel("index"),
            model_change=None,
            latent_shape=(1, 16, 1, 8, 8),
            pixels_per_latent=8,
        )

    assert reason() is None
    assert says in str(reason(**change))


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
