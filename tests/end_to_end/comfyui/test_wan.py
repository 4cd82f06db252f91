"""Wan in ComfyUI: what is not like the other families. The others' comparison is in ``test_family_parity``."""

from __future__ import annotations

import pytest
import torch
from comfyui_families import VARIANTS, drawn

from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


def test_a_model_that_sees_an_image_needs_one(weightless, ksample):
    variant = VARIANTS["wan21_image"]
    texts = [
        [[embeds, {**more, "clip_vision_output": None}]] for ((embeds, more),) in (variant.text(1), variant.text(2))
    ]
    with pytest.raises(Unsupported, match="no output of a CLIP vision model"):
        ksample(weightless("wan21_image"), *texts, variant.latent())


def test_what_cannot_be_run_is_refused(weightless, ksample):
    variant = VARIANTS["wan_text"]
    for more, says in (
        ({"reference_latents": [drawn(1, 16, 1, 4, 6)]}, "reference latents"),
        ({"time_dim_concat": drawn(1, 16, 1, 4, 6)}, "latents behind those of the video"),
        ({"context_latents": [drawn(1, 16, 1, 4, 6)]}, "reference latents \\(Bernini\\)"),
    ):
        with pytest.raises(Unsupported, match=says):
            ksample(weightless("wan_text"), variant.text(1, **more), variant.text(2), variant.latent())


def test_a_fallback_of_the_fused_sampler_is_stocks(weightless, stock, ksample, xsample, relative_error):
    variant = VARIANTS["wan_text"]
    positive, negative = variant.text(1), variant.text(2)
    ours, _, note = xsample(weightless("wan_text"), positive=positive, negative=negative, latent_image=variant.latent())
    assert note.startswith("step by step")
    assert relative_error(ours, ksample(stock("wan_text"), positive, negative, variant.latent())) <= 1e-6


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("wan_text", "vace_patch_embedding.weight", r"relative \(WAN21_Vace\): "),
        ("wan21_image", "img_emb.emb_pos", "a first and a last image"),
        ("wan_text", "ref_conv.weight", "a reference image"),
    ],
)
def test_relatives_are_refused_by_name(name, tensor, says, connected, variant_file, tmp_path):
    from safetensors.torch import load_file, save_file

    from xditd.client.comfyui.nodes.unet_loader import load_unet

    shape = {"img_emb.emb_pos": (1, 514, 1280), "ref_conv.weight": (256, 16, 2, 2)}.get(tensor, (256, 96, 1, 2, 2))
    path = tmp_path / "relative.safetensors"
    save_file({**load_file(variant_file(name)), f"model.diffusion_model.{tensor}": torch.zeros(shape)}, path)
    with pytest.raises(Unsupported, match=says):
        load_unet(str(path))
