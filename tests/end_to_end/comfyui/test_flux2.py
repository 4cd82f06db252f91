"""FLUX.2 in ComfyUI: the workers' loop, packed weights and the VAE; stock's samplers are in ``test_family_parity``."""

from __future__ import annotations

import flux2_vaes
import packed_checkpoints
import pytest
import torch
from comfyui_families import PREFIX, VARIANTS, drawn
from safetensors.torch import save_file

from xditd.gpu_workers.families.flux2_vae.config import Flux2VaeConfig

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-6
VAE_TOLERANCE = 1e-5

VAE = Flux2VaeConfig((64, 128, 256, 256), (128, 256, 512, 512), residuals=2, has_quant_conv=True)


@pytest.mark.parametrize("references", [(), ((4, 6), (3, 3))], ids=["text", "references"])
@pytest.mark.parametrize("model", ["flux2_dev", "flux2_klein"])
def test_the_workers_loop_is_comfyuis(model, references, weightless, stock, ksample, xsample, relative_error):
    variant = VARIANTS[model]
    latent = variant.latent(2, (5, 8))
    positive, negative = (variant.text(seed, 21, **variant.references(*references)) for seed in (1, 2))
    ours, _, note = xsample(weightless(model), positive=positive, negative=negative, latent_image=latent)
    assert note.startswith("fused: 4 steps in the workers")
    theirs = ksample(stock(model), positive, negative, latent)
    assert relative_error(ours, theirs) <= TOLERANCE


def test_packed_weights(comfy, connected, tmp_path, ksample, relative_error):
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    state = VARIANTS["flux2_dev"].make(0)
    path = packed_checkpoints.pack(state, "float8", torch.float32, prefix=PREFIX).save(tmp_path / "f.safetensors")
    variant = VARIANTS["flux2_dev"]
    texts, latent = (variant.text(1), variant.text(2)), variant.latent(size=(6, 8))
    expected = ksample(comfy.comfy.sd.load_diffusion_model(str(path)), *texts, dict(latent))
    assert relative_error(ksample(load_unet(str(path)), *texts, dict(latent)), expected) <= TOLERANCE


@torch.inference_mode()
def test_the_vae_decodes_and_encodes_as_stock_does(comfy, connected, tmp_path, relative_error):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    path = tmp_path / "flux2-vae.safetensors"
    save_file(flux2_vaes.state_dict(0, VAE), path)
    stock, ours = comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(path))), load_vae(str(path))
    latents = drawn(1, 128, 3, 4)
    assert relative_error(ours.decode(latents), stock.decode(latents)) <= VAE_TOLERANCE
    pixels = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(2))
    expected = stock.encode(pixels)
    assert expected.shape == (1, 128, 4, 3)
    assert relative_error(ours.encode(pixels), expected) <= VAE_TOLERANCE


@torch.inference_mode()
def test_a_stock_vae_decodes_in_the_workers(comfy, connected, tmp_path, weightless, xsample, relative_error):
    path = tmp_path / "flux2-vae.safetensors"
    save_file(flux2_vaes.state_dict(0, VAE), path)
    stock = comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(path)))
    variant = VARIANTS["flux2_dev"]
    latent = variant.latent(size=(4, 4))
    samples, image, note = xsample(
        weightless("flux2_dev"), positive=variant.text(1), negative=variant.text(2), latent_image=latent, vae=stock
    )
    assert note.startswith("fused: 4 steps in the workers")
    assert relative_error(image, stock.decode(samples)) <= VAE_TOLERANCE
