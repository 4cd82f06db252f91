"""FLUX.2 in ComfyUI: the remote MODEL, the workers' loop and the VAE give what the same ComfyUI gives locally."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flux2_models
import flux2_vaes
import packed_checkpoints
import pytest
import torch
from diffusers import Flux2Transformer2DModel  # noqa: F401 - before ComfyUI is on the path
from safetensors.torch import save_file

from xditd.gpu_workers.families.flux2_vae.config import Flux2VaeConfig
from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-6
GUIDED_TOLERANCE = 2e-6
"""A cfg of 3 multiplies the errors of its two predictions by three and two."""
VAE_TOLERANCE = 1e-5

PREFIX = "model.diffusion_model."
CONFIGS = {
    "dev": replace(flux2_models.DEV, double_blocks=1, single_blocks=1),
    "klein": replace(flux2_models.KLEIN, double_blocks=1, single_blocks=1),
}
VAE = Flux2VaeConfig((64, 128, 256, 256), (128, 256, 512, 512), residuals=2, has_quant_conv=True)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("dev", dict(sampler_name="euler", scheduler="simple")),
    ("dev", dict(sampler_name="dpmpp_2m", scheduler="sgm_uniform", denoise=0.6, guidance=2.0)),
    ("dev", dict(sampler_name="euler", scheduler="simple", batch=2, tokens=33, size=(5, 7), references=((4, 6),))),
    ("klein", dict(sampler_name="euler", scheduler="simple", cfg=3.0, tokens=41, size=(7, 4))),
    ("klein", dict(sampler_name="res_multistep", scheduler="simple", tokens=520, references=((4, 6), (3, 3)))),
]


def name_of(case: Any) -> str:
    return case if isinstance(case, str) else "-".join(f"{key}{value}" for key, value in case.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux2")
    for name, config in CONFIGS.items():
        save_file(flux2_models.state_dict(0, config, prefix=PREFIX), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in CONFIGS}


@pytest.fixture(scope="module")
def stocks(comfy, files) -> dict[str, Any]:
    return {name: comfy.comfy.sd.load_diffusion_model(str(path)) for name, path in files.items()}


@pytest.fixture
def weightless(connected, files) -> Callable[[str], Any]:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return lambda name: load_unet(str(files[name]))


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int, tokens: int = 16, **extras: Any) -> list[Any]:
    """Make conditioning as text encoding does."""
    return [[drawn(1, tokens, 96, seed=seed), {"pooled_output": None, **extras}]]


def extras_of(options: dict[str, Any]) -> dict[str, Any]:
    references = options.pop("references", ())
    found = {"guidance": options.pop("guidance", 3.0)}
    if references:
        found["reference_latents"] = [drawn(1, 128, *size, seed=9) for size in references]
    return found


@pytest.mark.parametrize(("model", "case"), CASES, ids=name_of)
def test_stock_ksampler(model, case, weightless, stocks, ksample, relative_error):
    options = dict(case)
    extras, tokens = extras_of(options), options.pop("tokens", 16)
    latent = {"samples": torch.zeros(options.pop("batch", 1), 128, *options.pop("size", (8, 8)))}
    if "denoise" in options:
        latent["samples"] = drawn(*latent["samples"].shape, seed=5)
    positive, negative = text(1, tokens, **extras), text(2, 16, **extras)
    ours, theirs = (ksample(each, positive, negative, latent, **options) for each in (weightless(model), stocks[model]))
    assert theirs.std() > 0.1
    assert relative_error(ours, theirs) <= (GUIDED_TOLERANCE if "cfg" in case else TOLERANCE)


@pytest.mark.parametrize("references", [(), ((4, 6), (3, 3))], ids=["text", "references"])
@pytest.mark.parametrize("model", list(CONFIGS))
def test_the_workers_loop_is_comfyuis(model, references, weightless, stocks, ksample, xsample, relative_error):
    extras = extras_of({"references": references})
    latent = {"samples": torch.zeros(2, 128, 5, 8)}
    positive, negative = text(1, 21, **extras), text(2, **extras)
    ours, _, note = xsample(weightless(model), positive=positive, negative=negative, latent_image=latent)
    assert note.startswith("fused: 4 steps in the workers")
    theirs = ksample(stocks[model], positive, negative, latent)
    assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("model", list(CONFIGS))
def test_a_stock_model_can_be_accelerated(model, connected, stocks, ksample, relative_error):
    from xditd.client.comfyui.accelerate import accelerate

    latent = {"samples": torch.zeros(1, 128, 6, 8)}
    remote = accelerate(stocks[model])
    found = [ksample(each, text(1, 21), text(2), latent, cfg=2.0) for each in (remote, stocks[model])]
    assert relative_error(*found) <= GUIDED_TOLERANCE


def test_a_lora_of_the_loaders_is_a_branch(comfy, weightless, stocks, ksample, relative_error):
    lora = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": drawn(4, 256) / 16,
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": drawn(768, 4, seed=2) / 2,
        "diffusion_model.single_blocks.0.linear1.lora_A.weight": drawn(4, 256, seed=3) / 16,
        "diffusion_model.single_blocks.0.linear1.lora_B.weight": drawn(2304, 4, seed=4) / 2,
    }
    latent = {"samples": torch.zeros(1, 128, 6, 8)}
    plain = ksample(stocks["dev"], text(1), text(2), latent)
    ours, theirs = (
        ksample(comfy.comfy.sd.load_lora_for_models(each, None, lora, 0.7, 0.0)[0], text(1), text(2), latent)
        for each in (weightless("dev"), stocks["dev"])
    )
    assert relative_error(theirs, plain) > 1e-3
    assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("method", ["offset", "uxo", "index_timestep_zero"])
def test_other_ways_to_place_references_are_refused(method, weightless, ksample):
    latent = {"samples": torch.zeros(1, 128, 4, 4)}
    extras = {"reference_latents": [latent["samples"]], "reference_latents_method": method}
    with pytest.raises(Unsupported, match=f"reference latents by the method '{method}'"):
        ksample(weightless("dev"), text(1, **extras), text(2), latent)


def test_packed_weights(comfy, connected, tmp_path, ksample, relative_error):
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    state = flux2_models.state_dict(0, CONFIGS["dev"], prefix=PREFIX)
    path = packed_checkpoints.pack(state, "float8", torch.float32, prefix=PREFIX).save(tmp_path / "f.safetensors")
    latent = {"samples": torch.zeros(1, 128, 6, 8)}
    expected = ksample(comfy.comfy.sd.load_diffusion_model(str(path)), text(1), text(2), dict(latent))
    assert relative_error(ksample(load_unet(str(path)), text(1), text(2), dict(latent)), expected) <= TOLERANCE


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
    latent = {"samples": torch.zeros(1, 128, 4, 4)}
    samples, image, note = xsample(
        weightless("dev"), positive=text(1), negative=text(2), latent_image=latent, vae=stock
    )
    assert note.startswith("fused: 4 steps in the workers")
    assert relative_error(image, stock.decode(samples)) <= VAE_TOLERANCE
