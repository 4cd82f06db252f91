"""Z-Image in ComfyUI: the workers' loop and packed weights; stock's samplers are in ``test_family_parity``."""

from __future__ import annotations

import packed_checkpoints
import pytest
import torch
from comfyui_families import PREFIX, VARIANTS

from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-6
NAME = "z_image"
VARIANT = VARIANTS[NAME]


def test_the_workers_loop_is_comfyuis(weightless, stock, ksample, xsample, latent, relative_error):
    positive, negative = VARIANT.text(1, 21), VARIANT.text(2)
    ours, _, note = xsample(weightless(NAME), positive=positive, negative=negative, latent_image=latent)
    assert note.startswith("fused: 4 steps in the workers")
    theirs = ksample(stock(NAME), positive, negative, latent)
    assert relative_error(ours, theirs) <= TOLERANCE


def test_a_shifted_schedule_runs_in_the_workers_loop(
    comfy, weightless, stock, ksample, xsample, latent, relative_error
):
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    shifted, local = (ModelSamplingAuraFlow().patch_aura(model(NAME), 1.2)[0] for model in (weightless, stock))
    positive, negative = VARIANT.text(1, 21), VARIANT.text(2)
    ours, _, note = xsample(shifted, positive=positive, negative=negative, latent_image=latent)
    assert note.startswith("fused: 4 steps in the workers")
    assert relative_error(ours, ksample(local, positive, negative, latent)) <= TOLERANCE
    assert relative_error(ours, ksample(stock(NAME), positive, negative, latent)) > 1e-3


def test_reference_latents_are_refused(weightless, ksample, latent):
    with pytest.raises(Unsupported, match=r"reference latents \(Z-Image Omni and Edit\) cannot run in the workers"):
        ksample(weightless(NAME), VARIANT.text(1, reference_latents=[latent["samples"]]), VARIANT.text(2), latent)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"z_image_modulation": False}, "it is Lumina 2 or a related model"),
        ({"siglip_feat_dim": 1152}, r"it reads images besides the text \(Z-Image Omni or Edit\)"),
        ({"pad_tokens_multiple": None}, "it has no padding tokens"),
    ],
)
def test_relatives_are_refused_by_name(comfy, stock, changes, says):
    from types import SimpleNamespace

    from xditd.client.comfyui.families import adapter_of_model

    family = adapter_of_model(stock(NAME).model)
    assert family is not None
    config = stock(NAME).model.model_config
    family.check_config(config, "a file")
    with pytest.raises(Unsupported, match=f"a file: {says}"):
        family.check_config(SimpleNamespace(unet_config=config.unet_config | changes), "a file")


@pytest.mark.parametrize(("format", "bar"), [("float8", TOLERANCE), ("old", TOLERANCE), ("int8_convrot", 2e-2)])
@pytest.mark.parametrize("through", ["loader", "accelerate"])
def test_packed(format, bar, through, comfy, connected, tmp_path, ksample, latent, relative_error):
    """Stock dequantises fp8 on a CPU, and rounds the inputs of int8 layers, which the workers do not."""
    from xditd.client.comfyui.accelerate import accelerate
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    path = packed_checkpoints.pack(VARIANT.make(0), format, torch.float32, prefix=PREFIX).save(
        tmp_path / "z.safetensors"
    )
    local = comfy.comfy.sd.load_diffusion_model(str(path))
    expected = ksample(local, VARIANT.text(1), VARIANT.text(2), dict(latent))
    ours = load_unet(str(path)) if through == "loader" else accelerate(local)
    assert relative_error(ksample(ours, VARIANT.text(1), VARIANT.text(2), dict(latent)), expected) <= bar
