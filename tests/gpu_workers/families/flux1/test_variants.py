"""Kontext, Fill, Canny and Depth: the bits of diffusers' pipelines on one rank; wrong pictures are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from flux1_variants import HEIGHT, WIDTH, numbers, pictures, state_of, text

from xditd.client.demo.checkpoints import flux1_state_dict, flux_vae_state_dict
from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import Wanted
from xditd.ipc.errors import BadRequest, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]

SCALING, SHIFT = 0.3611, 0.1159


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


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [pytest.param(torch.float32, 1, marks=pytest.mark.long), (torch.float32, 2), (torch.bfloat16, 1)],
)
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


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [pytest.param(torch.float32, 1, marks=pytest.mark.long), (torch.float32, 2), (torch.bfloat16, 1)],
)
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


def test_fill_takes_a_soft_mask_of_a_picture_as_the_pipeline_does(
    cache: ModelCache, plug: Plugger, direct: ModuleType
) -> None:
    from diffusers import FluxFillPipeline

    state, noise = state_of(384, torch.float32), numbers(3, 1, 16, HEIGHT // 8, WIDTH // 8)
    mask, picture = numbers(5, 1, 1, HEIGHT, WIDTH).sigmoid(), numbers(6, 1, 3, HEIGHT, WIDTH).clamp(-1, 1)
    pipeline = pipeline_of(FluxFillPipeline, state, reference.vae_from(flux_vae_state_dict(1)))
    expected = pipeline(
        image=picture, mask_image=mask.clone(), generator=torch.Generator().manual_seed(7), height=HEIGHT, width=WIDTH,
        num_inference_steps=2, latents=packed_noise(noise), output_type="latent", **text(1),
    ).images  # fmt: skip
    model, given = plug(cache, state).model, {**text(1), "image": picture, "mask": mask}
    wanted = Wanted(1, HEIGHT, WIDTH, 2, 30.0)
    sampled = model.operations.recipe.sampled(model.config, wanted, given)
    assert (list(sampled.before), sampled.skipped, list(sampled.after)) == ([], 1, ["masked_image_latents"])
    masked = sampled.after["masked_image_latents"]
    z = pipeline.vae.encode(masked).latent_dist.sample(torch.Generator().manual_seed(7))
    given["masked_image_latents"] = (z - SHIFT) * SCALING
    ours = direct.generate_from(model, given, noise, steps=2, height=HEIGHT, width=WIDTH)
    assert torch.allclose(ours, unpacked(expected), atol=1e-5)  # the picture's order in memory is another
    assert not torch.allclose(masked, picture * (1 - mask), atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "batch", "size"),
    [
        (torch.float32, 2, (8, 12)),
        (torch.bfloat16, 1, (6, 4)),
        pytest.param(torch.float32, 1, (8, 12), marks=pytest.mark.long),
        pytest.param(torch.float32, 1, (6, 4), marks=pytest.mark.long),
        pytest.param(torch.float32, 2, (6, 4), marks=pytest.mark.long),
        pytest.param(torch.bfloat16, 1, (8, 12), marks=pytest.mark.long),
    ],
)
def test_kontext_has_the_bits_of_the_pipeline(
    cache: ModelCache, plug: Plugger, direct: ModuleType, dtype: torch.dtype, batch: int, size: tuple[int, int]
) -> None:
    from diffusers import FluxKontextPipeline

    state, noise = flux1_state_dict(1, dtype=dtype), numbers(3, batch, 16, HEIGHT // 8, WIDTH // 8).to(dtype)
    picture, given = numbers(9, 1, 16, *size).to(dtype), {name: each.to(dtype) for name, each in text(batch).items()}
    vae = reference.vae_from(flux_vae_state_dict(1), dtype=dtype)
    found = pipeline_of(FluxKontextPipeline, state, vae)(
        image=picture, height=HEIGHT, width=WIDTH, max_area=HEIGHT * WIDTH, num_inference_steps=3, guidance_scale=2.5,
        latents=packed_noise(noise), output_type="latent", _auto_resize=False, **given,
    ).images  # fmt: skip
    model = plug(cache, state).model
    sizes = {"steps": 3, "guidance_scale": 2.5, "height": HEIGHT, "width": WIDTH}
    ours = direct.generate_from(model, {**given, "reference_latents": [picture[0]]}, noise, **sizes)
    assert torch.equal(ours, unpacked(found))
    assert not torch.equal(ours, direct.generate_from(model, given, noise, **sizes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "0 tensors where a list of one tensor is needed"),
        ([numbers(1, 16, 8, 8)] * 2, "2 tensors where.*join several pictures"),
        (numbers(1, 16, 8, 8), "Tensor where a list of one tensor"),
        ([numbers(1, 16, 8, 7)], r"reference_latents\[0\]: shape is \[16, 8, 7\], use even sides of at most 1024"),
        ([numbers(1, 4, 8, 8)], r"reference_latents\[0\]: shape is \[4, 8, 8\]"),
        ([torch.full((16, 8, 8), torch.nan)], r"reference_latents\[0\]"),
    ],
    ids=str,
)
def test_wrong_references_are_refused_by_name(
    cache: ModelCache, plug: Plugger, direct: ModuleType, given: Any, message: str
) -> None:
    model, noise = plug(cache, flux1_state_dict(1)).model, numbers(3, 1, 16, HEIGHT // 8, WIDTH // 8)
    with pytest.raises(BadRequest, match=message):
        direct.generate_from(model, {**text(1), "reference_latents": given}, noise, steps=1, height=HEIGHT, width=WIDTH)


@pytest.mark.parametrize("channels", [128, 384])
def test_float32_time_gives_the_same_within_rounding(
    cache: ModelCache, plug: Plugger, direct: ModuleType, channels: int
) -> None:
    model, noise = plug(cache, state_of(channels)).model, numbers(3, 1, 16, HEIGHT // 8, WIDTH // 8)
    given = {**text(1), **pictures(channels)}
    found = [
        direct.generate_from(model, given, noise, steps=2, height=HEIGHT, width=WIDTH, variant=variant)
        for variant in ("class", "float32_time")
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


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
            model, {**text(1), **pictures(channels), **changed}, noise, steps=1, height=HEIGHT, width=WIDTH
        )


def test_other_channels_are_refused_by_name(cache: ModelCache) -> None:
    state = state_of(192)
    with pytest.raises(Unsupported, match=r"img_in takes 192 channels.*64 \(dev, schnell, Kontext\).*384 \(Fill\)"):
        cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("channels", "names", "scale"),
    [(64, (), 3.5), (128, (), 3.5), (384, ("mask",), 30.0)],
)
def test_facts_say_what_an_image_is_made_from(
    cache: ModelCache, plug: Plugger, channels: int, names: tuple[str, ...], scale: float
) -> None:
    model = plug(cache, state_of(channels)).model
    facts = model.operations_for("transformer").facts(model.config, model.layout)
    assert tuple(each.name for each in facts.conditioning[2:] if each.is_needed) == names
    assert facts.default_guidance_scale == scale
    assert facts.arguments[0].shape[-1] == channels
