"""Z-Image in ComfyUI: the remote MODEL and the workers' loop give the latents of the same ComfyUI running locally.

ComfyUI detects Z-Image by its width, 3840; these tests change that width, so that the model is small enough for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import packed_checkpoints
import pytest
import torch
import z_image_models
from diffusers import ZImageTransformer2DModel  # noqa: F401 - before ComfyUI is on the path
from safetensors.torch import save_file

from xditd.gpu_workers.families.z_image.config import ZImageConfig
from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-6
GUIDED_TOLERANCE = 2e-6
"""A cfg of 3 multiplies the errors of its two predictions by three and two."""

HIDDEN, HEADS = 1152, 9
"""The smallest width for which ComfyUI's module and diffusers' class round the MLP's and time's widths equally."""
CONFIG = ZImageConfig(hidden=HIDDEN, layers=1, refiners=2, text_channels=64)

CASES = [
    dict(sampler_name="euler", scheduler="simple"),
    dict(sampler_name="dpmpp_2m", scheduler="sgm_uniform", cfg=3.0, denoise=0.6),
    dict(sampler_name="euler", scheduler="simple", cfg=3.0, tokens=41, negative_tokens=16),
    dict(sampler_name="euler", scheduler="simple", batch=2, tokens=33, cfg=2.0),
    dict(sampler_name="res_multistep", scheduler="simple", pixels=120),
]


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) if isinstance(value, str) else f"{key}{value}" for key, value in case.items())


@pytest.fixture(scope="module", autouse=True)
def _another_width(comfy) -> Iterator[None]:
    import comfy.model_detection as detection
    import comfy.supported_models as known

    detect = detection.detect_unet_config

    def as_if_wide(state_dict: dict[str, torch.Tensor], key_prefix: str, *given: Any, **more: Any) -> Any:
        name = f"{key_prefix}cap_embedder.1.weight"
        if name not in state_dict or state_dict[name].shape[0] != HIDDEN:
            return detect(state_dict, key_prefix, *given, **more)
        wide = {**state_dict, name: torch.empty(3840, state_dict[name].shape[1], device="meta")}
        found = detect(wide, key_prefix, *given, **more)
        return found | {"dim": HIDDEN, "n_heads": HEADS, "n_kv_heads": HEADS}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "detect_unet_config", as_if_wide)
        patch.setattr(known.ZImage, "unet_config", known.ZImage.unet_config | {"dim": HIDDEN})
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("z_image") / "z_image.safetensors"
    save_file(z_image_models.state_dict(0, CONFIG, names=z_image_models.COMFYUI, prefix="model.diffusion_model."), path)
    return path


@pytest.fixture(scope="module")
def stock(comfy, file) -> Any:
    return comfy.comfy.sd.load_diffusion_model(str(file))


@pytest.fixture
def weightless(connected, file) -> Any:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return load_unet(str(file))


@pytest.fixture(scope="module")
def text() -> Callable[..., list[Any]]:
    """Make conditioning as text encoding does."""

    def make(seed: int, tokens: int = 16, **extras: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        embeds = torch.randn(1, tokens, CONFIG.text_channels, generator=generator)
        return [[embeds, {"pooled_output": None, "attention_mask": torch.ones(1, tokens), **extras}]]

    return make


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_stock_ksampler(case, weightless, stock, text, ksample, relative_error):
    options = dict(case)
    pixels, batch = options.pop("pixels", 128), options.pop("batch", 1)
    tokens = options.pop("tokens", 16)
    positive, negative = text(1, tokens), text(2, options.pop("negative_tokens", tokens))
    latent = {"samples": torch.zeros(batch, 16, pixels // 8, pixels // 8)}
    if "denoise" in options:
        latent["samples"] = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(5))
    ours, theirs = (ksample(model, positive, negative, latent, **options) for model in (weightless, stock))
    assert theirs.std() > 0.1
    assert relative_error(ours, theirs) <= (GUIDED_TOLERANCE if "cfg" in case else TOLERANCE)


def test_the_workers_loop_is_comfyuis(weightless, stock, text, ksample, xsample, latent, relative_error):
    positive, negative = text(1, 21), text(2)
    ours, _, note = xsample(weightless, positive=positive, negative=negative, latent_image=latent)
    assert note.startswith("fused: 4 steps in the workers")
    theirs = ksample(stock, positive, negative, latent)
    assert relative_error(ours, theirs) <= TOLERANCE


def test_a_shifted_schedule_runs_in_the_workers_loop(
    comfy, weightless, stock, text, ksample, xsample, latent, relative_error
):
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    shifted, local = (ModelSamplingAuraFlow().patch_aura(model, 1.2)[0] for model in (weightless, stock))
    positive, negative = text(1, 21), text(2)
    ours, _, note = xsample(shifted, positive=positive, negative=negative, latent_image=latent)
    assert note.startswith("fused: 4 steps in the workers")
    assert relative_error(ours, ksample(local, positive, negative, latent)) <= TOLERANCE
    assert relative_error(ours, ksample(stock, positive, negative, latent)) > 1e-3


def test_a_stock_model_can_be_accelerated(connected, stock, text, ksample, latent, relative_error):
    from xditd.client.comfyui.accelerate import accelerate

    remote = accelerate(stock)
    found = [ksample(model, text(1, 21), text(2), latent, cfg=2.0) for model in (remote, stock)]
    assert relative_error(*found) <= TOLERANCE


def test_reference_latents_are_refused(weightless, text, ksample, latent):
    with pytest.raises(Unsupported, match=r"reference latents \(Z-Image Omni and Edit\) cannot run in the workers"):
        ksample(weightless, text(1, reference_latents=[latent["samples"]]), text(2), latent)


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

    family = adapter_of_model(stock.model)
    assert family is not None
    family.check_config(stock.model.model_config, "a file")
    with pytest.raises(Unsupported, match=f"a file: {says}"):
        family.check_config(SimpleNamespace(unet_config=stock.model.model_config.unet_config | changes), "a file")


@pytest.mark.parametrize(("format", "bar"), [("float8", TOLERANCE), ("old", TOLERANCE), ("int8_convrot", 2e-2)])
@pytest.mark.parametrize("through", ["loader", "accelerate"])
def test_packed(format, bar, through, comfy, connected, tmp_path, text, ksample, latent, relative_error):
    """Stock dequantises fp8 on a CPU, and rounds the inputs of int8 layers, which the workers do not."""
    from xditd.client.comfyui.accelerate import accelerate
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    prefix = "model.diffusion_model."
    state = z_image_models.state_dict(0, CONFIG, names=z_image_models.COMFYUI, prefix=prefix)
    path = packed_checkpoints.pack(state, format, torch.float32, prefix=prefix).save(tmp_path / "z.safetensors")
    local = comfy.comfy.sd.load_diffusion_model(str(path))
    expected = ksample(local, text(1), text(2), dict(latent))
    ours = load_unet(str(path)) if through == "loader" else accelerate(local)
    assert relative_error(ksample(ours, text(1), text(2), dict(latent)), expected) <= bar
