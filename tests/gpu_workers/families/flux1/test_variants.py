"""Fill, Canny and Depth: the bits of diffusers' pipelines on one rank; what they are made from is checked by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch

from xditd.client.demo.checkpoints import flux1_state_dict, flux_vae_state_dict
from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.ipc.errors import BadRequest, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]

SCALING, SHIFT = 0.3611, 0.1159
HEIGHT, WIDTH = 64, 96


def state_of(channels: int, dtype: torch.dtype = torch.float32) -> State:
    state = flux1_state_dict(1, dtype=dtype)
    hidden = state["img_in.weight"].shape[0]
    generator = torch.Generator().manual_seed(channels)
    state["img_in.weight"] = (torch.randn(hidden, channels, generator=generator) / channels**0.5).to(dtype)
    return state


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(batch: int) -> State:
    return {"prompt_embeds": numbers(1, batch, 15, 4096), "pooled_prompt_embeds": numbers(2, batch, 768)}


def pipeline_of(kind: type, state: State, vae: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from xditd.gpu_workers.families.flux1.config import DEV_SCHEDULER

    model = reference.transformer_from(state)
    rest = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipeline = kind(FlowMatchEulerDiscreteScheduler(**DEV_SCHEDULER), vae, transformer=model, **rest)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(packed, HEIGHT, WIDTH, 8)


def packed_noise(noise: torch.Tensor) -> torch.Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(noise, *noise.shape)


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)])
def test_canny_and_depth_have_the_bits_of_the_pipeline(
    cache: ModelCache, plug: Plugger, direct: ModuleType, dtype: torch.dtype, batch: int
) -> None:
    from diffusers import FluxControlPipeline

    state, noise, picture = (
        state_of(128, dtype),
        numbers(3, batch, 16, HEIGHT // 8, WIDTH // 8),
        numbers(4, batch, 3, HEIGHT, WIDTH),
    )
    vae = reference.vae_from(flux_vae_state_dict(1), dtype=dtype)
    given = {name: each.to(dtype) for name, each in text(batch).items()}
    control = vae.encode(picture.clamp(-1, 1).to(dtype)).latent_dist.sample(torch.Generator().manual_seed(7))
    expected = pipeline_of(FluxControlPipeline, state, vae)(
        control_image=picture.clamp(-1, 1), generator=torch.Generator().manual_seed(7), height=HEIGHT, width=WIDTH,
        num_inference_steps=3, guidance_scale=3.5, latents=packed_noise(noise).to(dtype), output_type="latent", **given,
    ).images  # fmt: skip
    conditioning = {**given, "control_latents": (control - SHIFT) * SCALING}
    ours = direct.generate_from(
        plug(cache, state).model, conditioning, noise, steps=3, guidance_scale=3.5, height=HEIGHT, width=WIDTH
    )
    assert ours.dtype == dtype
    assert torch.equal(ours, unpacked(expected))


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)])
def test_fill_has_the_bits_of_the_pipeline(
    cache: ModelCache, plug: Plugger, direct: ModuleType, dtype: torch.dtype, batch: int
) -> None:
    from diffusers import FluxFillPipeline

    state, noise = state_of(384, dtype), numbers(3, batch, 16, HEIGHT // 8, WIDTH // 8).to(dtype)
    mask, picture = (numbers(5, batch, 1, HEIGHT, WIDTH) > 0).float(), numbers(6, batch, 3, HEIGHT, WIDTH).clamp(-1, 1)
    pipeline = pipeline_of(FluxFillPipeline, state, reference.vae_from(flux_vae_state_dict(1), dtype=dtype))
    given = {name: each.to(dtype) for name, each in text(batch).items()}
    z = pipeline.vae.encode((picture * (1 - mask)).to(dtype)).latent_dist.sample(torch.Generator().manual_seed(7))
    expected = pipeline(
        image=picture, mask_image=mask, generator=torch.Generator().manual_seed(7), height=HEIGHT, width=WIDTH,
        num_inference_steps=3, latents=packed_noise(noise), output_type="latent", **given,
    ).images  # fmt: skip
    conditioning = {**given, "masked_image_latents": (z - SHIFT) * SCALING, "mask": mask}
    ours = direct.generate_from(plug(cache, state).model, conditioning, noise, steps=3, height=HEIGHT, width=WIDTH)
    assert torch.equal(ours, unpacked(expected))


@pytest.mark.parametrize("channels", [128, 384])
def test_float32_time_gives_the_same_within_rounding(
    cache: ModelCache, plug: Plugger, direct: ModuleType, channels: int
) -> None:
    model, noise = plug(cache, state_of(channels)).model, numbers(3, 1, 16, HEIGHT // 8, WIDTH // 8)
    given = {**text(1), **images(channels)}
    found = [
        direct.generate_from(model, given, noise, steps=2, height=HEIGHT, width=WIDTH, variant=variant)
        for variant in ("class", "float32_time")
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def images(channels: int) -> Mapping[str, torch.Tensor]:
    latents = numbers(8, 1, 16, HEIGHT // 8, WIDTH // 8)
    if channels == 128:
        return {"control_latents": latents}
    return {"masked_image_latents": latents, "mask": torch.ones(1, 1, HEIGHT, WIDTH)}


@pytest.mark.parametrize(
    ("channels", "changed", "message"),
    [
        (128, {"control_latents": numbers(1, 1, 16, 8, 11)}, r"control_latents: shape is \[1, 16, 8, 11\].*16, 8, 12"),
        (384, {"mask": torch.ones(1, 1, 8, 12)}, r"mask: shape is \[1, 1, 8, 12\], use \[1, 1, 64, 96\]"),
        (384, {"mask": torch.ones(1, 1, HEIGHT, WIDTH, dtype=torch.bool)}, "mask: dtype is bool"),
        (384, {"masked_image_latents": numbers(1, 2, 16, 8, 12)}, "masked_image_latents: shape"),
    ],
)
def test_wrong_images_are_refused_by_name(
    cache: ModelCache,
    plug: Plugger,
    direct: ModuleType,
    channels: int,
    changed: Mapping[str, torch.Tensor],
    message: str,
) -> None:
    model, noise = plug(cache, state_of(channels)).model, numbers(3, 1, 16, HEIGHT // 8, WIDTH // 8)
    with pytest.raises(BadRequest, match=message):
        direct.generate_from(
            model, {**text(1), **images(channels), **changed}, noise, steps=1, height=HEIGHT, width=WIDTH
        )


def test_other_channels_are_refused_by_name(cache: ModelCache) -> None:
    state = state_of(192)
    with pytest.raises(Unsupported, match=r"img_in takes 192 channels.*64 \(dev, schnell, Kontext\).*384 \(Fill\)"):
        cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("channels", "names", "scale"),
    [(64, (), 3.5), (128, ("control_latents",), 3.5), (384, ("masked_image_latents", "mask"), 30.0)],
)
def test_facts_say_what_an_image_is_made_from(
    cache: ModelCache, plug: Plugger, channels: int, names: tuple[str, ...], scale: float
) -> None:
    model = plug(cache, state_of(channels)).model
    facts = model.operations_for("transformer").facts(model.config, model.layout)
    assert tuple(each.name for each in facts.conditioning[2:] if each.is_needed) == names
    assert facts.default_guidance_scale == scale
    assert facts.arguments[0].shape[-1] == channels
