"""``Generate`` on one rank gives the bits of ``QwenImagePipeline``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import qwen_image_models
import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import Wanted
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import Schedule

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A generation: ``negatives`` are the tokens of the negative prompts, ``lengths`` those that count in each row."""

    scale: float = 1.0
    size: tuple[int, int] = (16, 16)
    tokens: int = 20
    batch: int = 1
    negatives: int | None = None
    lengths: tuple[int, ...] = ()
    negative_lengths: tuple[int, ...] = ()
    sigmas: tuple[float, ...] | None = None
    shift: float | None = None
    steps: int = 3

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)
        texts = {"prompt_embeds": (self.tokens, self.lengths)}
        if self.negatives is not None:
            texts["negative_prompt_embeds"] = (self.negatives, self.negative_lengths)
        given = {}
        for name, (tokens, lengths) in texts.items():
            given[name] = torch.randn(self.batch, tokens, 96, generator=generator)
            if lengths:
                given[f"{name}_mask"] = qwen_image_models.mask(lengths, tokens).long()
        return given

    @property
    def noise(self) -> torch.Tensor:
        return torch.randn(self.batch, 16, *self.size, generator=torch.Generator().manual_seed(1))

    @property
    def schedule(self) -> Any:
        if self.sigmas is not None:
            return qwen_image_models.scheduler(use_dynamic_shifting=False, shift_terminal=None)
        if self.shift is not None:
            log = math.log(self.shift)
            return qwen_image_models.scheduler(base_shift=log, max_shift=log, shift_terminal=None)
        return None


SAMPLES = {
    "without guidance": Sample(),
    "odd rows of tokens, odd text, batch of two": Sample(size=(10, 18), tokens=7, batch=2),
    "guided": Sample(scale=4.0, negatives=20),
    "guided by a negative of another length": Sample(scale=4.0, negatives=7, size=(6, 10)),
    "guided batch, one text padded": Sample(
        scale=2.5, negatives=9, batch=2, lengths=(20, 4), negative_lengths=(9, 9), size=(6, 10)
    ),
    "guided, no token of the texts counts": Sample(
        scale=2.5, negatives=9, batch=2, lengths=(0, 4), negative_lengths=(0, 0), size=(6, 10)
    ),
    "given sigmas": Sample(sigmas=(1.0, 0.7, 0.31)),
    "the schedule of Lightning": Sample(shift=3.0, steps=4),
    "a large image's schedule": Sample(size=(128, 128), tokens=3, steps=2),
}


def plugged(cache: ModelCache, plug: Plugger, **given: Any) -> tuple[CachedModel, Any]:
    state = qwen_image_models.state_dict(0, **given)
    return plug(cache, state).model, qwen_image_models.reference(state)


def generate(model: CachedModel, sample: Sample, **more: Any) -> torch.Tensor:
    import direct_jobs  # not before the group is started

    height, width = sample.size
    asked: dict[str, Any] = {
        "height": height * 8,
        "width": width * 8,
        "steps": sample.steps,
        "guidance_scale": sample.scale,
        "sigmas": sample.sigmas,
        "noise": sample.noise,
        "conditioning": sample.conditioning,
        "options": {} if sample.shift is None else {"shift": sample.shift},
    }
    return direct_jobs.generate_from(model, **(asked | more))


def expected_of(reference: Any, sample: Sample) -> torch.Tensor:
    conditioning = {
        name: each.to(reference.dtype) if each.is_floating_point() else each
        for name, each in sample.conditioning.items()
    }
    return qwen_image_models.pipeline_latents(
        reference,
        noise=sample.noise.to(reference.dtype),
        steps=sample.steps,
        conditioning=conditioning,
        true_cfg_scale=sample.scale,
        sigmas=None if sample.sigmas is None else list(sample.sigmas),
        schedule=sample.schedule,
    )


@pytest.mark.parametrize("case", list(SAMPLES))
def test_generating_gives_the_bits_of_the_pipeline(shared_cache: ModelCache, plug: Plugger, case: str) -> None:
    model, reference = plugged(shared_cache, plug)
    assert torch.equal(generate(model, SAMPLES[case]), expected_of(reference, SAMPLES[case]))


@pytest.mark.parametrize("case", ["without guidance", "guided batch, one text padded"])
def test_bfloat16_latents_are_the_pipeline_s(shared_cache: ModelCache, plug: Plugger, case: str) -> None:
    model, reference = plugged(shared_cache, plug, dtype=torch.bfloat16)
    assert model.operations.recipe.noise_dtype(model.dtype, "class") == torch.bfloat16
    found = generate(model, SAMPLES[case])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected_of(reference, SAMPLES[case]))


def test_the_norms_of_guided_predictions_are_those_of_the_prompt_s(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug)
    sample = SAMPLES["guided"]
    wanted = Wanted(1, 128, 128, 3, 4.0)
    started = model.operations.recipe.start(model, wanted, sample.conditioning, sample.noise)
    positive, negative = (torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(each)) for each in (1, 2))
    found = started.predicted([positive, negative], started.latents, 0)
    assert torch.allclose(found.norm(dim=-1), positive.norm(dim=-1))
    assert not torch.allclose(found, negative + 4.0 * (positive - negative))


def test_the_variant_of_comfyui_keeps_latents_in_float32(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug, dtype=torch.bfloat16)
    found = generate(model, SAMPLES["without guidance"], variant="comfyui")
    assert found.dtype == torch.float32
    assert not torch.equal(found.bfloat16(), generate(model, SAMPLES["without guidance"]))


def test_facts(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug)
    facts = model.operations.facts(model.config, model.layout)
    assert (facts.guidance, facts.default_guidance_scale, facts.default_steps) == ("classifier_free", 4.0, 50)
    assert [each.name for each in facts.conditioning if each.is_needed] == ["prompt_embeds"]
    assert facts.latents.shape(1, 1024, 768) == (1, 16, 128, 96)


def test_options_that_cannot_be_obeyed_are_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug)
    for options, sigmas, says in (
        ({"shift": 0.0}, None, "shift 0: use a number above 0, such as 3"),
        ({"shift": 3.0}, (1.0, 0.5, 0.1), "shift 3 with sigmas"),
    ):
        with pytest.raises(BadRequest, match=says):
            model.operations.recipe.check(model.config, Wanted(1, 64, 64, 3, 1.0, sigmas=sigmas, options=options))
    linear = Schedule(
        class_name="FlowMatchEulerDiscreteScheduler",
        settings={"use_dynamic_shifting": True, "time_shift_type": "linear"},
    )
    with pytest.raises(BadRequest, match="shift 3 beside a scheduler with time_shift_type='linear': leave one out"):
        model.operations.recipe.check(model.config, Wanted(1, 64, 64, 3, 1.0, options={"shift": 3.0}, schedule=linear))
    stretched = Schedule(class_name="FlowMatchEulerDiscreteScheduler", settings={"shift_terminal": 0.02})
    for given in ({}, {"sigmas": (1.0,), "schedule": stretched}):
        with pytest.raises(BadRequest, match=r"steps 1: .* of which there have to be two"):
            model.operations.recipe.check(model.config, Wanted(1, 64, 64, 1, 1.0, **given))
    model.operations.recipe.check(model.config, Wanted(1, 64, 64, 1, 1.0, sigmas=(1.0,)))


def test_conditioning_that_cannot_be_obeyed_is_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    sample = SAMPLES["guided"]
    model, _ = plugged(shared_cache, plug)
    recipe, prompt = model.operations.recipe, sample.conditioning["prompt_embeds"]
    wanted = Wanted(1, 128, 128, 3, 4.0)
    plain = dataclasses.replace(wanted, guidance_scale=1.0)
    for conditioning, asked, says in (
        ({"prompt_embeds": prompt}, wanted, "negative_prompt_embeds is missing: guidance_scale 4 needs one"),
        (sample.conditioning, plain, "negative_prompt_embeds with guidance_scale 1 would have no effect"),
        (
            {"prompt_embeds": prompt, "negative_prompt_embeds_mask": torch.ones(1, 20)},
            plain,
            "negative_prompt_embeds_mask without negative_prompt_embeds",
        ),
        (
            {"prompt_embeds": prompt, "negative_prompt_embeds": prompt.repeat(2, 1, 1)},
            wanted,
            r"negative_prompt_embeds: shape is \[2, 20, 96\], use \[1, any, 96\]",
        ),
        ({"prompt_embeds": prompt[..., 1:]}, plain, r"prompt_embeds: shape is \[1, 20, 95\]"),
        (
            {"prompt_embeds": prompt, "prompt_embeds_mask": torch.ones(1, 19)},
            plain,
            r"prompt_embeds_mask: shape is \[1, 19\], use \[1, 20\]",
        ),
        ({"prompt_embeds": prompt * float("nan")}, plain, "prompt_embeds"),
        ({"prompt_embeds": torch.ones(1, 4093, 96)}, plain, "prompt_embeds: 4093 tokens after images"),
    ):
        with pytest.raises(BadRequest, match=says):
            recipe.start(model, asked, conditioning, sample.noise)
