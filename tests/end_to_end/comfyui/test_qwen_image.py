"""Qwen-Image in ComfyUI: the remote MODEL gives the latents of the same ComfyUI running locally.

ComfyUI builds Qwen-Image with 24 heads and texts of 3584 channels; these tests change both, so that the model is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import qwen_image_models
import torch
from diffusers import QwenImageTransformer2DModel  # noqa: F401 - before ComfyUI is on the path
from safetensors.torch import save_file

from xditd.gpu_workers.families.qwen_image.config import QwenImageConfig
from xditd.gpu_workers.families.wan_vae.checkpoint import WanVae
from xditd.gpu_workers.families.wan_vae.config import WanVaeConfig
from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-6
GUIDED_TOLERANCE = 2e-6
"""A cfg of 3 multiplies the errors of its two predictions by three and two."""

PREFIX = "model.diffusion_model."
CONFIG = QwenImageConfig(hidden=256, blocks=2, text_channels=96)
EDIT_2511 = replace(CONFIG, has_marker=True)

CASES = [
    dict(sampler_name="euler", scheduler="simple"),
    dict(sampler_name="dpmpp_2m", scheduler="sgm_uniform", cfg=3.0, denoise=0.6),
    dict(sampler_name="euler", scheduler="simple", cfg=3.0, tokens=41, negative_tokens=16),
    dict(sampler_name="euler", scheduler="simple", batch=2, tokens=33, counted=20, cfg=2.0),
    dict(sampler_name="res_multistep", scheduler="simple", pixels=(120, 88)),
]


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) if isinstance(value, str) else f"{key}{value}" for key, value in case.items())


@pytest.fixture(scope="module", autouse=True)
def _small(comfy) -> Iterator[None]:
    import comfy.model_detection as detection

    detect = detection.detect_unet_config

    def as_small(state_dict: dict[str, torch.Tensor], key_prefix: str, *given: Any, **more: Any) -> Any:
        found = detect(state_dict, key_prefix, *given, **more)
        if found is not None and found.get("image_model") == "qwen_image":
            sizes = {"num_attention_heads": CONFIG.heads, "joint_attention_dim": CONFIG.text_channels}
            return found | sizes
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "detect_unet_config", as_small)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("qwen_image")
    for name, config in (("base", CONFIG), ("2511", EDIT_2511)):
        save_file(qwen_image_models.state_dict(0, config, prefix=PREFIX), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("base", "2511")}


@pytest.fixture(scope="module")
def stock(comfy, files) -> dict[str, Any]:
    return {name: comfy.comfy.sd.load_diffusion_model(str(path)) for name, path in files.items()}


@pytest.fixture
def weightless(connected, files) -> Callable[[str], Any]:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return lambda name: load_unet(str(files[name]))


@pytest.fixture(scope="module")
def text() -> Callable[..., list[Any]]:
    """Make conditioning as text encoding does; ``counted`` tokens are no padding."""

    def make(seed: int, tokens: int = 16, counted: int | None = None, **extras: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        embeds = torch.randn(1, tokens, CONFIG.text_channels, generator=generator)
        mask = {} if counted is None else {"attention_mask": (torch.arange(tokens)[None] < counted).long()}
        return [[embeds, {"pooled_output": None, **mask, **extras}]]

    return make


def references_of(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(1, 16, 1, *size, generator=torch.Generator().manual_seed(sum(size))) for size in sizes]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_stock_ksampler(case, weightless, stock, text, ksample, relative_error):
    options = dict(case)
    pixels, batch = options.pop("pixels", (128, 128)), options.pop("batch", 1)
    tokens, counted = options.pop("tokens", 16), options.pop("counted", None)
    positive, negative = text(1, tokens, counted), text(2, options.pop("negative_tokens", tokens), counted)
    latent = {"samples": torch.zeros(batch, 16, *(side // 8 for side in pixels))}
    if "denoise" in options:
        latent["samples"] = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(5))
    ours, theirs = (
        ksample(model, positive, negative, latent, **options) for model in (weightless("base"), stock["base"])
    )
    assert theirs.std() > 0.1
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= (GUIDED_TOLERANCE if "cfg" in case else TOLERANCE)


@pytest.mark.parametrize("model", ["base", "2511"])
@pytest.mark.parametrize("sizes", [((12, 8),), ((6, 10), (9, 7)), ((40, 24),)], ids=["one", "two", "large"])
def test_references(model, sizes, weightless, stock, text, ksample, latent, relative_error):
    positive, negative = (text(seed, reference_latents=references_of(*sizes)) for seed in (1, 2))
    ours, theirs = (ksample(each, positive, negative, latent, cfg=2.0) for each in (weightless(model), stock[model]))
    assert relative_error(ours, theirs) <= GUIDED_TOLERANCE
    without = ksample(stock[model], text(1), text(2), latent, cfg=2.0)
    assert relative_error(without, theirs) > 1e-3


def test_a_stock_model_can_be_accelerated(connected, stock, text, ksample, latent, relative_error):
    from xditd.client.comfyui.accelerate import accelerate

    for name in ("base", "2511"):
        remote = accelerate(stock[name])
        given = text(1, 21, reference_latents=references_of((6, 10))), text(2)
        found = [ksample(model, *given, latent, cfg=2.0) for model in (remote, stock[name])]
        assert relative_error(*found) <= GUIDED_TOLERANCE


def test_what_the_workers_cannot_run_is_named(weightless, text, ksample, latent):
    others = {"base": "index_timestep_zero", "2511": "index"}
    for name, method in others.items():
        given = text(1, reference_latents=references_of((6, 10)), reference_latents_method=method)
        with pytest.raises(Unsupported, match=f"reference latents by the method '{method}'"):
            ksample(weightless(name), given, text(2), latent)
    frames = {"samples": torch.zeros(1, 16, 2, 8, 8)}
    with pytest.raises(Unsupported, match="latents of several frames"):
        ksample(weightless("base"), text(1), text(2), frames)


def test_layered_is_refused_by_name(comfy, stock):
    from xditd.client.comfyui.families import adapter_of_model

    family = adapter_of_model(stock["base"].model)
    assert family is not None
    family.check_config(stock["base"].model.model_config, "a file")
    changed = stock["base"].model.model_config.unet_config | {"use_additional_t_cond": True}
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
