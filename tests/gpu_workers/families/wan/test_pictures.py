"""``Generate`` from a first and a last image gives the bits of ``WanImageToVideoPipeline``'s latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import wan_models
import wan_vaes
from wan_samples import VideoSample, generate

from xditd.gpu_workers.families.wan.config import WanConfig
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import Wanted
from xditd.ipc.errors import BadRequest

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
IMAGE, CLIP_IMAGE, TWO_IMAGES, TI2V = (
    wan_models.IMAGE, wan_models.CLIP_IMAGE, wan_models.TWO_IMAGES, wan_models.TI2V
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sample(VideoSample):
    """A generation from images."""

    config: WanConfig = IMAGE
    has_last: bool = False

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.batch)
        tokens = 512 if self.config.image_channels else 11
        names = ["prompt_embeds", *(["negative_prompt_embeds"] if self.scale > 1 else [])]
        found = {name: torch.randn(self.batch, tokens, 48, generator=generator) for name in names}
        sides = (self.sides["height"], self.sides["width"])
        for name in ("image", *(["last_image"] if self.has_last else [])):
            # Numbers that a change of range keeps.
            found[name] = torch.randint(0, 257, (1, 3, *sides), generator=generator) / 128 - 1
        if self.config.image_channels:
            images = 2 if self.config.has_image_positions else 1
            found["image_embeds"] = torch.randn(images, 257, self.config.image_channels, generator=generator)
        return found


SAMPLES = {
    "Wan 2.2": Sample(),
    "Wan 2.2, a last image": Sample(has_last=True),
    "Wan 2.2, distilled, one frame": Sample(scale=1.0, size=(1, 4, 4)),
    "Wan 2.2, Euler, a shift, batch of two": Sample(batch=2, options={"euler": True, "shift": 5.0}, size=(2, 4, 4)),
    "Wan 2.1": Sample(config=CLIP_IMAGE, size=(2, 4, 6)),
    "Wan 2.1, batch of two": Sample(config=CLIP_IMAGE, size=(2, 4, 4), batch=2),
    "Wan 2.1, two images": Sample(config=TWO_IMAGES, has_last=True, size=(2, 4, 4)),
    "Wan 2.1, two images, batch of two": Sample(config=TWO_IMAGES, has_last=True, size=(2, 4, 4), batch=2),
    "TI2V": Sample(config=TI2V, size=(3, 4, 6)),
    "TI2V, one step, one frame": Sample(config=TI2V, size=(1, 2, 2), steps=1),
    "TI2V, one step by Euler, odd tokens": Sample(config=TI2V, size=(2, 2, 6), steps=1, options={"euler": True}),
    "Wan 2.2, one step": Sample(steps=1, size=(2, 4, 4)),
    "TI2V, batch of two, distilled": Sample(config=TI2V, size=(2, 2, 4), batch=2, scale=1.0),
}
VAES = {False: wan_vaes.SMALL, True: wan_vaes.SMALL_2_2}


def models(
    layout: Any, plug: Plugger, sample: Sample, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[CachedModel, Any, CachedModel, Any]:
    """Return the transformer and the VAE, each with plain diffusers'. The VAE has a cache of its own."""
    state = wan_models.state_dict(seed, sample.config, dtype=dtype)
    config = VAES[sample.config.has_time_per_token]
    of_vae = wan_vaes.state_dict(config=config)
    vae = wan_vaes.reference(of_vae, config)
    means, deviations = (each.flatten().tolist() for each in wan_vaes.statistics(config))
    vae.register_to_config(latents_mean=means, latents_std=deviations)
    return (
        plug(ModelCache(layout), state).model, wan_models.reference(state, sample.config),
        plug(ModelCache(layout), of_vae).model, vae,
    )  # fmt: skip


@pytest.mark.parametrize("case", list(SAMPLES))
def test_generating_gives_the_bits_of_the_pipeline(layout: Any, plug: Plugger, case: str) -> None:
    sample = SAMPLES[case]
    model, reference, vae, plain = models(layout, plug, sample)
    expected = wan_models.image_pipeline_latents(reference, None, plain, sample)
    found = generate(model, vae, sample)
    assert torch.equal(found, expected)
    other = {"image": sample.conditioning["image"].flip(-1)}
    assert wan_models.relative_error(generate(model, vae, sample, conditioning=other), expected) > 1e-3


@pytest.mark.parametrize("case", ["Wan 2.2, a last image", "TI2V", "Wan 2.1"])
def test_bfloat16_latents_are_the_pipeline_s(layout: Any, plug: Plugger, case: str) -> None:
    sample = SAMPLES[case]
    model, reference, vae, plain = models(layout, plug, sample, torch.bfloat16)
    assert torch.equal(generate(model, vae, sample), wan_models.image_pipeline_latents(reference, None, plain, sample))


def test_two_transformers_change_at_the_boundary_of_wan_2_2(layout: Any, plug: Plugger) -> None:
    sample = dataclasses.replace(SAMPLES["Wan 2.2, a last image"], steps=6, options={"guidance_scale_2": 3.0})
    high, of_high, vae, plain = models(layout, plug, sample)
    low, of_low, *_ = models(layout, plug, sample, seed=7)
    expected = wan_models.image_pipeline_latents(of_high, of_low, plain, sample)
    assert torch.equal(generate(high, vae, sample, second=low), expected)


def test_each_row_of_a_batch_may_have_an_image_of_its_own(layout: Any, plug: Plugger) -> None:
    one = dataclasses.replace(SAMPLES["Wan 2.1"], size=(2, 4, 4))
    two = dataclasses.replace(one, batch=2)
    model, _, vae, _ = models(layout, plug, one)
    images = torch.cat([one.conditioning["image"], one.conditioning["image"].flip(-1)])
    states = torch.cat([one.conditioning["image_embeds"], one.conditioning["image_embeds"].flip(-1)])
    together = generate(model, vae, two, conditioning={"image": images, "image_embeds": states})
    for row in range(2):
        alone = {name: each[row : row + 1] for name, each in {"image": images, "image_embeds": states}.items()}
        texts = ("prompt_embeds", "negative_prompt_embeds")
        alone |= {name: two.conditioning[name][row : row + 1] for name in texts}
        found = generate(model, vae, one, conditioning=alone, noise=two.noise[row : row + 1])
        assert wan_models.relative_error(found[0], together[row]) <= 1e-5


def wanted(sample: Sample, **changes: Any) -> Wanted:
    given: dict[str, Any] = {"vae_dtype": torch.float32, **sample.sides, **changes}
    return Wanted(sample.batch, steps=3, guidance_scale=5.0, **given)


@pytest.mark.parametrize(
    ("case", "conditioning", "says"),
    [
        ("Wan 2.2", {"image": torch.zeros(1, 3, 32, 40)}, "image: 32 x 40 pixels, but the video has 32 x 48; resize"),
        (
            "Wan 2.2",
            {"image": torch.zeros(1, 4, 32, 48)},
            r"image: shape is \[1, 4, 32, 48\], use \[any, 3, any, any\]",
        ),
        ("Wan 2.2", {"image": torch.zeros(2, 3, 32, 48)}, "image: 2 for 1 videos: give one for each, or one for all"),
        ("Wan 2.2", {"image": torch.full((1, 3, 32, 48), 255.0)}, "image: values from 255 to 255, use -1 to 1"),
        ("Wan 2.2", {"image": torch.full((1, 3, 32, 48), torch.nan)}, "image: values from nan to nan"),
        ("Wan 2.2", {"image": torch.zeros(1, 3, 32, 48, dtype=torch.uint8)}, "image: dtype is uint8"),
        ("Wan 2.2", {"last_image": torch.zeros(1, 3, 48, 32)}, "last_image: 48 x 32 pixels, but the video has 32 x 48"),
        ("TI2V", {"image": torch.zeros(1, 3, 32, 48)}, "image: 32 x 48 pixels, but the video has 64 x 96"),
    ],
    ids=str,
)
def test_pictures_that_cannot_be_used_are_refused(
    layout: Any, plug: Plugger, case: str, conditioning: dict[str, torch.Tensor], says: str
) -> None:
    sample = SAMPLES[case]
    model, *_ = models(layout, plug, sample)
    given = sample.conditioning | conditioning
    with pytest.raises(BadRequest, match=says):
        model.operations.recipe.pictures(model.config, wanted(sample), given)


def test_a_last_image_needs_frames_before_it(layout: Any, plug: Plugger) -> None:
    sample = dataclasses.replace(SAMPLES["Wan 2.2, a last image"], size=(1, 4, 6))
    model, *_ = models(layout, plug, sample)
    with pytest.raises(BadRequest, match="last_image: the video has one frame, which is image"):
        model.operations.recipe.pictures(model.config, wanted(sample), sample.conditioning)
    two = {"image": torch.zeros(2, 3, 32, 48), "last_image": torch.zeros(1, 3, 32, 48)}
    with pytest.raises(BadRequest, match="last_image: 1 images, but image has 2"):
        model.operations.recipe.pictures(model.config, dataclasses.replace(wanted(sample), batch=2), two)


def test_states_of_another_number_of_images_are_refused(layout: Any, plug: Plugger) -> None:
    for config, states, says in (
        (CLIP_IMAGE, torch.zeros(2, 257, 64), "states of 2 images for 1 videos: give those of the first image, once"),
        (CLIP_IMAGE, torch.zeros(1, 256, 64), r"image_embeds: shape is \[1, 256, 64\], use \[any, 257, 64\]"),
        (TWO_IMAGES, torch.zeros(1, 257, 64), "give those of the first and the last image"),
    ):
        sample = Sample(config=config, has_last=config is TWO_IMAGES, size=(2, 4, 4))
        model, _, vae, _ = models(layout, plug, sample)
        with pytest.raises(BadRequest, match=says):
            generate(model, vae, sample, conditioning={"image_embeds": states})


def test_a_job_without_a_vae_cannot_encode_a_picture(layout: Any, plug: Plugger) -> None:
    from xditd.gpu_workers.jobs.pictures import pictures_of

    sample = SAMPLES["Wan 2.2"]
    model, *_ = models(layout, plug, sample)
    recipe = model.operations.recipe
    with pytest.raises(BadRequest, match="image: the workers encode it, but the job has no vae; give vae="):
        pictures_of(recipe, model.config, wanted(sample, vae_dtype=None), sample.conditioning)
