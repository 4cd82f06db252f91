"""Wan in ComfyUI: what is not like the other families. The others' comparison is in ``test_family_parity``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_families import VARIANTS, drawn
from safetensors.torch import load_file, save_file

from xditd.ipc.errors import BadCheckpoint, Unsupported

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
    ("name", "tensor", "shape", "says"),
    [
        ("wan_text", "ref_conv.weight", (256, 16, 2, 2), "it reads a reference image"),
        ("wan22_image", "control_adapter.conv.weight", (1,), "it is Wan 2.2 Fun with a camera's path (WAN22_Camera)"),
        ("wan21_image", "patch_embedding.weight", (256, 48, 1, 2, 2), "it is Wan 2.1 Fun Control"),
        (
            "wan22_image",
            "patch_embedding.weight",
            (256, 52, 1, 2, 2),
            "it has 52 channels, to 16 (Wan 2.2 Fun Control)",
        ),
        ("wan22_ti2v", "patch_embedding.weight", (256, 148, 1, 2, 2), "it has 148 channels, to 48"),
        ("wan_text", "casual_audio_encoder.encoder.final_linear.weight", (1,), "it is Wan 2.2 S2V"),
        ("wan_text", "audio_proj.audio_proj_glob_1.layer.bias", (1,), "it is HuMo"),
        ("wan_text", "face_adapter.fuser_blocks.0.k_norm.weight", (1,), "it is Wan 2.2 Animate"),
        ("wan_text", "patch_embedding_pose.weight", (1,), "it is SCAIL (WAN21_SCAIL)"),
        ("wan_text", "patch_embedding_mask.weight", (1,), "it is SCAIL 2"),
        ("wan22_image", "patch_embedding_global.weight", (1,), "it is WanDancer"),
        ("wan_vace", "vace_patch_embedding.weight", (256, 80, 1, 2, 2), "it has controls of 80 channels for 16"),
        ("wan21_two_images", "img_emb.emb_pos", (1, 771, 1280), "it has positions of 771 tokens of images"),
    ],
)
def test_relatives_are_refused_by_name(name, tensor, shape, says, connected, variant_file, tmp_path):
    path = tmp_path / "relative.safetensors"
    save_file({**load_file(variant_file(name)), f"model.diffusion_model.{tensor}": torch.zeros(shape)}, path)
    with pytest.raises(Unsupported, match=f"relative: {re.escape(says)}"):
        load(path)


@pytest.mark.parametrize(
    ("name", "header", "says"),
    [
        ("wan_text", {"model_type": "flow_rvs"}, "it is FlowRVS"),
        ("wan21_image", {"model_type": "animate2"}, "it is Wan Animate 2"),
        ("wan_text", {"causal_ar": True}, "it is Wan that predicts one frame after another"),
        ("wan_text", {"eps": 1e-5}, "its header sets eps to 1e-05, not 1e-06"),
    ],
)
@pytest.mark.parametrize("through", ["loader", "accelerate"])
def test_relatives_that_their_header_alone_tells_are_refused(
    through, name, header, says, comfy, connected, variant_file, tmp_path
):
    from xditd.client.comfyui.accelerate import accelerate

    path = tmp_path / "relative.safetensors"
    save_file(load_file(variant_file(name)), path, {"config": json.dumps({"transformer": header})})
    kind = type(comfy.comfy.sd.load_diffusion_model(str(path)).model).__name__
    with pytest.raises(Unsupported, match=says if through == "loader" or kind == "WAN21" else f"the MODEL is {kind}"):
        load(path) if through == "loader" else accelerate(comfy.comfy.sd.load_diffusion_model(str(path)))


@pytest.mark.parametrize("config", ["{", "[]", '{"transformer": 5}'])
def test_a_header_that_is_no_configuration_is_refused(config, connected, variant_file, tmp_path):
    path = tmp_path / "broken.safetensors"
    save_file(load_file(variant_file("wan_text")), path, {"config": config})
    with pytest.raises(BadCheckpoint, match="broken: config in the file's header is no configuration in JSON"):
        load(path)


def test_subjects_of_phantom_are_refused(weightless, ksample):
    """WanPhantomSubjectToVideo puts the latents of its images behind those of the video."""
    from comfy_extras.nodes_wan import WanPhantomSubjectToVideo

    class Vae:
        def encode(self, image: torch.Tensor) -> torch.Tensor:
            return drawn(1, 16, 1, image.shape[1] // 8, image.shape[2] // 8)

    variant = VARIANTS["wan_text"]
    images = torch.rand(1, 32, 48, 3)
    positive, negative, _, latent = WanPhantomSubjectToVideo.execute(
        variant.text(1), variant.text(2), Vae(), 48, 32, 5, 1, images
    ).result
    with pytest.raises(Unsupported, match="latents behind those of the video"):
        ksample(weightless("wan_text"), positive, negative, latent)


def load(path: Path) -> Any:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return load_unet(str(path))
