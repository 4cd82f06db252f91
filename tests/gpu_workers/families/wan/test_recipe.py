"""``Generate`` on one rank gives the bits of ``WanPipeline``'s latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import wan_models
from wan_samples import VideoSample

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import Wanted
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import Sampling, Schedule

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
TI2V = wan_models.TI2V
EULER = "FlowMatchEulerDiscreteScheduler"


@dataclasses.dataclass(frozen=True)
class Sample(VideoSample):
    """A generation: ``negatives`` are the tokens of the negative prompts."""

    size: tuple[int, int, int] = (3, 6, 10)
    steps: int = 4
    tokens: int = 20
    negatives: int | None = 20

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)
        lengths = {"prompt_embeds": self.tokens, "negative_prompt_embeds": self.negatives}
        return {
            name: torch.randn(self.batch, tokens, 48, generator=generator)
            for name, tokens in lengths.items()
            if tokens is not None
        }


SAMPLES = {
    "guided": Sample(),
    "distilled, one frame": Sample(scale=1.0, negatives=None, size=(1, 4, 4)),
    "negatives of another length, batch of two": Sample(negatives=7, batch=2, size=(2, 4, 6)),
    "a shift": Sample(options={"shift": 8.0}),
    "Euler": Sample(options={"euler": True}),
    "Euler, a shift": Sample(options={"euler": True, "shift": 5.0}, negatives=None, scale=1.0),
    "TI2V, a time for each token": Sample(config=TI2V, size=(2, 4, 6)),
}
PAIRS = {
    "two transformers": Sample(steps=6, options={"boundary_ratio": 0.7, "guidance_scale_2": 3.0}),
    "two transformers, the boundary of A14B": Sample(steps=6, batch=2, size=(2, 4, 4)),
    "two transformers, only the first is needed": Sample(options={"boundary_ratio": 0.0}),
    "two transformers, only the second is needed": Sample(options={"boundary_ratio": 1.0}, size=(1, 4, 4)),
}


def plugged(cache: ModelCache, plug: Plugger, sample: Sample, seed: int = 0, **given: Any) -> tuple[CachedModel, Any]:
    state = wan_models.state_dict(seed, sample.config, **given)
    return plug(cache, state).model, wan_models.reference(state, sample.config)


def generate(model: CachedModel, sample: Sample, **more: Any) -> torch.Tensor:
    import direct_jobs  # not before the group is started

    asked: dict[str, Any] = {
        **sample.sides,
        "steps": sample.steps,
        "guidance_scale": sample.scale,
        "options": sample.options,
        "noise": sample.noise,
        "conditioning": sample.conditioning,
    }
    return direct_jobs.generate_from(model, **(asked | more))


@pytest.mark.parametrize("case", list(SAMPLES))
def test_generating_gives_the_bits_of_the_pipeline(shared_cache: ModelCache, plug: Plugger, case: str) -> None:
    sample = SAMPLES[case]
    model, reference = plugged(shared_cache, plug, sample)
    expected = wan_models.pipeline_latents(reference, None, sample)
    assert torch.equal(generate(model, sample), expected)


@pytest.mark.parametrize("case", ["guided", "Euler"])
def test_bfloat16_latents_are_the_pipeline_s(shared_cache: ModelCache, plug: Plugger, case: str) -> None:
    sample = SAMPLES[case]
    model, reference = plugged(shared_cache, plug, sample, dtype=torch.bfloat16)
    assert torch.equal(generate(model, sample), wan_models.pipeline_latents(reference, None, sample))


@pytest.mark.parametrize("case", list(PAIRS))
def test_two_transformers_change_at_the_boundary(layout: Any, plug: Plugger, case: str) -> None:
    sample = PAIRS[case]
    # Two models: the weights of both are plugged at once.
    high, of_high = plugged(ModelCache(layout), plug, sample)
    low, of_low = plugged(ModelCache(layout), plug, sample, seed=7)
    found = generate(high, sample, second=low)
    assert torch.equal(found, wan_models.pipeline_latents(of_high, of_low, sample))
    if case == "two transformers":
        assert not torch.equal(found, generate(low, sample, second=high))


def test_given_sigmas_are_used_as_they_are(shared_cache: ModelCache, plug: Plugger) -> None:
    model, reference = plugged(shared_cache, plug, SAMPLES["guided"])
    sigmas = (1.0, 0.9, 0.6, 0.2)
    for options in ({"euler": True}, {}):
        sample = dataclasses.replace(SAMPLES["guided"], options=options)
        expected = wan_models.pipeline_latents(reference, None, sample, sigmas)
        assert torch.equal(generate(model, sample, sigmas=sigmas), expected), options


def test_facts_say_how_videos_are_made(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug, SAMPLES["guided"])
    facts = model.operations.facts(model.config, model.layout)
    assert (facts.guidance, facts.default_guidance_scale, facts.default_steps, facts.stages) == (
        "classifier_free", 5.0, 50, 2
    )  # fmt: skip
    assert facts.latents.shape(1, 720, 1280, 81) == (1, 16, 21, 90, 160)
    facts.latents.check_frames(161)
    for frames in (0, 4, 1_029):
        with pytest.raises(BadRequest, match=f"frames: {frames} is not 1 more than a multiple of 4"):
            facts.latents.check_frames(frames)
    ti2v, _ = plugged(shared_cache, plug, SAMPLES["TI2V, a time for each token"])
    assert ti2v.operations.facts(ti2v.config, ti2v.layout).latents.shape(2, 704, 1280, 121) == (2, 48, 31, 44, 80)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"options": {"shift": 0.0}}, "options: shift=0.0 is not a number from 0.01 to 100"),
        ({"options": {"shift": True}}, "options: shift=True is not a number"),
        ({"options": {"euler": 1}}, "options: euler=1 is not True or False"),
        ({"options": {"boundary_ratio": 0.9}}, "boundary_ratio without a second transformer would have no effect"),
        ({"options": {"boundary_ratio": 1.5}, "stages": 2}, "boundary_ratio=1.5 is not a number from 0 to 1"),
        (
            {"options": {"guidance_scale_2": 3.0}, "stages": 2, "guidance_scale": 1.0},
            "guidance_scale_2 with guidance_scale 1 would have no effect",
        ),
        ({"options": {"shift": 3.0}, "sigmas": (1.0, 0.5)}, "shift with sigmas would have no effect"),
        ({"sigmas": (1.0, 0.5), "schedule": Schedule(class_name=EULER)}, "sigmas beside a scheduler: the pipelines of"),
    ],
)
def test_options_that_cannot_be_obeyed_are_refused(
    shared_cache: ModelCache, plug: Plugger, changes: dict[str, Any], says: str
) -> None:
    model, _ = plugged(shared_cache, plug, SAMPLES["guided"])
    wanted = dataclasses.replace(Wanted(1, 48, 80, 4, 5.0, frames=9), **changes)
    with pytest.raises(BadRequest, match=says):
        model.operations.recipe.check(model.config, wanted)


def test_conditioning_that_cannot_be_obeyed_is_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    sample = SAMPLES["guided"]
    model, _ = plugged(shared_cache, plug, sample)
    recipe, prompt = model.operations.recipe, sample.conditioning["prompt_embeds"]
    wanted = Wanted(1, 48, 80, 4, 5.0, frames=9)
    for conditioning, asked, says in (
        ({"prompt_embeds": prompt}, wanted, "negative_prompt_embeds is missing: guidance_scale 5 needs one"),
        (
            sample.conditioning,
            dataclasses.replace(wanted, guidance_scale=1.0),
            "negative_prompt_embeds with guidance_scale 1 would have no effect",
        ),
        (
            {"prompt_embeds": prompt, "negative_prompt_embeds": prompt.repeat(2, 1, 1)},
            wanted,
            r"negative_prompt_embeds: shape is \[2, 20, 48\], use \[1, any, 48\]",
        ),
        ({**sample.conditioning, "prompt_embeds": prompt[..., 1:]}, wanted, r"prompt_embeds: shape is \[1, 20, 47\]"),
        ({**sample.conditioning, "prompt_embeds": prompt * float("nan")}, wanted, "prompt_embeds"),
    ):
        with pytest.raises(BadRequest, match=says):
            recipe.start(model, asked, conditioning, sample.noise)


def test_an_image_is_one_frame() -> None:
    assert Sampling(height=8, width=8, steps=1).frames == 1
