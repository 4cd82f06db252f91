"""Wan in ComfyUI: the remote MODEL gives the latents of the same ComfyUI running locally, also a pair of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wan_models
from diffusers import WanTransformer3DModel  # noqa: F401 - before ComfyUI is on the path
from safetensors.torch import save_file

from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-6
TEXT_CHANNELS = 4096
"""ComfyUI reads neither these from the file, nor those of CLIP's vision model, 1280."""
CONFIGS = {
    "text": replace(wan_models.TEXT, text_channels=TEXT_CHANNELS),
    "clip": replace(wan_models.CLIP_IMAGE, text_channels=TEXT_CHANNELS, image_channels=1280),
}

CASES = [
    dict(sampler_name="euler", scheduler="simple"),
    dict(sampler_name="uni_pc", scheduler="simple", cfg=3.0, size=(3, 6, 10)),
    dict(sampler_name="euler", scheduler="simple", cfg=3.0, tokens=41, negative_tokens=16, batch=2),
    dict(sampler_name="euler", scheduler="simple", size=(1, 5, 7)),
]


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) if isinstance(value, str) else f"{key}{value}" for key, value in case.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wan")
    for name, (config, seed) in {
        "text": (CONFIGS["text"], 0),
        "low": (CONFIGS["text"], 7),
        "clip": (CONFIGS["clip"], 0),
    }.items():
        state = wan_models.state_dict(seed, config, prefix="model.diffusion_model.")
        save_file(state, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("text", "low", "clip")}


@pytest.fixture(scope="module")
def stock(comfy, files) -> Callable[[str], Any]:
    return lambda name: comfy.comfy.sd.load_diffusion_model(str(files[name]))


@pytest.fixture
def weightless(connected, files) -> Callable[[str], Any]:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return lambda name: load_unet(str(files[name]))


def text(seed: int, tokens: int = 16, **extras: Any) -> list[Any]:
    """Make conditioning as text encoding does."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, TEXT_CHANNELS, generator=generator), {"pooled_output": None, **extras}]]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_stock_ksampler(case, weightless, stock, ksample, relative_error):
    options = dict(case)
    size, batch = options.pop("size", (2, 4, 6)), options.pop("batch", 1)
    tokens = options.pop("tokens", 16)
    positive, negative = text(1, tokens), text(2, options.pop("negative_tokens", tokens))
    latent = {"samples": torch.zeros(batch, 16, *size)}
    ours, theirs = (
        ksample(model, positive, negative, latent, **options) for model in (weightless("text"), stock("text"))
    )
    assert theirs.std() > 0.1
    assert relative_error(ours, theirs) <= TOLERANCE


def test_a_first_image_with_clip_vision(weightless, stock, ksample, relative_error):
    generator = torch.Generator().manual_seed(3)
    seen = type("Seen", (), {"penultimate_hidden_states": torch.randn(1, 257, 1280, generator=generator)})()
    first = {
        "clip_vision_output": seen,
        "concat_latent_image": torch.randn(1, 16, 2, 4, 6, generator=generator),
        "concat_mask": torch.ones(1, 1, 2, 4, 6),
    }
    positive, negative = (text(seed, 512, **first) for seed in (1, 2))
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    given = dict(sampler_name="euler", scheduler="simple", cfg=3.0)
    ours, theirs = (ksample(model("clip"), positive, negative, latent, **given) for model in (weightless, stock))
    assert relative_error(ours, theirs) <= TOLERANCE
    with pytest.raises(Unsupported, match="no output of a CLIP vision model"):
        ksample(weightless("clip"), text(1, 512), text(2, 512), latent, **given)


def test_what_cannot_be_run_is_refused(weightless, ksample):
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    with pytest.raises(Unsupported, match="reference latents"):
        ksample(weightless("text"), text(1, reference_latents=[torch.zeros(1, 16, 1, 4, 6)]), text(2), latent)


def test_a_pair_of_advanced_samplers(comfy, weightless, stock, relative_error):
    """Wan 2.2: one model samples the first steps, another the rest."""
    import nodes

    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    found = []
    for load in (weightless, stock):
        sample = nodes.KSamplerAdvanced().sample
        given = dict(steps=4, cfg=3.0, sampler_name="euler", scheduler="simple", positive=text(1), negative=text(2))
        (half,) = sample(
            model=load("text"), add_noise="enable", noise_seed=7, latent_image=latent, start_at_step=0, end_at_step=2,
            return_with_leftover_noise="enable", **given,
        )  # fmt: skip
        (whole,) = sample(
            model=load("low"), add_noise="disable", noise_seed=7, latent_image=half, start_at_step=2, end_at_step=4,
            return_with_leftover_noise="disable", **given,
        )  # fmt: skip
        found.append(whole["samples"])
    assert relative_error(*found) <= TOLERANCE
