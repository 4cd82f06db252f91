"""``Generate`` on one rank gives the bits of ``Flux2Pipeline`` and ``Flux2KleinPipeline``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flux2_models
import pytest
import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import Wanted
from xditd.ipc.errors import BadRequest

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
DEV, KLEIN = flux2_models.DEV, flux2_models.KLEIN


@dataclasses.dataclass(frozen=True)
class Sample:
    """A generation: ``negatives`` are the tokens of the negative prompts."""

    scale: float = 4.0
    size: tuple[int, int] = (8, 8)
    tokens: int = 20
    batch: int = 1
    negatives: int | None = None
    sigmas: tuple[float, ...] | None = None
    steps: int = 3
    references: tuple[tuple[int, int], ...] = ()
    has_cache: bool = False

    @property
    def config(self) -> Any:
        return DEV if self.scale == 4.0 else KLEIN

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)
        lengths = {"prompt_embeds": self.tokens, "negative_prompt_embeds": self.negatives}
        return {
            name: torch.randn(self.batch, tokens, 96, generator=generator)
            for name, tokens in lengths.items()
            if tokens is not None
        }

    @property
    def reference_latents(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        return [torch.randn(128, *size, generator=generator) for size in self.references]

    @property
    def noise(self) -> torch.Tensor:
        return torch.randn(self.batch, 128, *self.size, generator=torch.Generator().manual_seed(1))


SAMPLES = {
    "dev": Sample(),
    "dev, odd sides and text, batch of two": Sample(size=(5, 9), tokens=7, batch=2),
    "dev, more than 4300 tokens' schedule is another rule": Sample(size=(64, 68), tokens=3, steps=1),
    "dev, given sigmas": Sample(sigmas=(1.0, 0.7, 0.31)),
    "klein, distilled": Sample(scale=1.0, steps=4),
    "dev, a reference": Sample(references=((4, 6),)),
    "dev, two references, batch of two": Sample(references=((5, 3), (8, 8)), size=(3, 5), batch=2),
    "klein's base, a reference": Sample(scale=3.0, negatives=7, references=((4, 6),)),
    "klein, KV cache": Sample(scale=1.0, references=((4, 6), (3, 5)), size=(5, 7), has_cache=True, steps=4),
    "klein, KV cache, batch of two": Sample(scale=1.0, references=((4, 6),), batch=2, has_cache=True),
    "klein, KV cache without a reference": Sample(scale=1.0, has_cache=True),
    "klein's base": Sample(scale=3.0, negatives=20),
    "klein's base, negatives of another length, batch of two": Sample(scale=3.0, negatives=7, batch=2, size=(3, 5)),
}


def plugged(cache: ModelCache, plug: Plugger, sample: Sample, **given: Any) -> tuple[CachedModel, Any]:
    state = flux2_models.state_dict(0, sample.config, **given)
    return plug(cache, state).model, flux2_models.reference(state, sample.config)


def generate(model: CachedModel, sample: Sample, **more: Any) -> torch.Tensor:
    import direct_jobs  # not before the group is started

    height, width = sample.size
    asked: dict[str, Any] = {
        "height": height * 16,
        "width": width * 16,
        "steps": sample.steps,
        "guidance_scale": sample.scale,
        "sigmas": sample.sigmas,
        "noise": sample.noise,
        "conditioning": sample.conditioning,
        "options": {"kv_cache": 1.0} if sample.has_cache else {},
    }
    if sample.references:
        asked["conditioning"] |= {"reference_latents": sample.reference_latents}
    return direct_jobs.generate_from(model, **(asked | more))


def expected_of(reference: Any, sample: Sample) -> torch.Tensor:
    return flux2_models.pipeline_latents(
        reference,
        noise=sample.noise.to(reference.dtype),
        steps=sample.steps,
        conditioning={name: each.to(reference.dtype) for name, each in sample.conditioning.items()},
        guidance_scale=sample.scale,
        sigmas=sample.sigmas,
        references=sample.reference_latents,
        has_cache=sample.has_cache,
    )


@pytest.mark.parametrize("case", list(SAMPLES))
def test_generating_gives_the_bits_of_the_pipeline(shared_cache: ModelCache, plug: Plugger, case: str) -> None:
    sample = SAMPLES[case]
    model, reference = plugged(shared_cache, plug, sample)
    assert torch.equal(generate(model, sample), expected_of(reference, sample))


def test_bfloat16_latents_are_the_pipeline_s(shared_cache: ModelCache, plug: Plugger) -> None:
    for case in ("dev", "klein's base"):
        sample = SAMPLES[case]
        model, reference = plugged(shared_cache, plug, sample, dtype=torch.bfloat16)
        assert model.operations.recipe.noise_dtype(model.dtype, "class") == torch.bfloat16
        found = generate(model, sample)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected_of(reference, sample))


def test_the_variant_of_comfyui_keeps_latents_in_float32(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug, SAMPLES["dev"], dtype=torch.bfloat16)
    found = generate(model, SAMPLES["dev"], variant="float32_time")
    assert found.dtype == torch.float32
    assert not torch.equal(found.bfloat16(), generate(model, SAMPLES["dev"]))


def test_facts_say_how_guidance_works(shared_cache: ModelCache, plug: Plugger) -> None:
    of = {}
    for case in ("dev", "klein, distilled"):
        model, _ = plugged(shared_cache, plug, SAMPLES[case])
        of[case] = model.operations.facts(model.config, model.layout)
    dev, klein = of.values()
    assert (dev.guidance, dev.default_guidance_scale, dev.default_steps) == ("embedded", 4.0, 50)
    assert (klein.guidance, klein.default_guidance_scale, klein.default_steps) == ("classifier_free", 1.0, 4)
    assert [each.name for each in dev.conditioning] == ["prompt_embeds", "reference_latents"]
    assert [each.name for each in klein.conditioning] == [
        "prompt_embeds",
        "negative_prompt_embeds",
        "reference_latents",
    ]
    assert (dev.options, klein.options) == ((), ("kv_cache",))
    assert dev.latents.shape(1, 1024, 768) == (1, 128, 64, 48)


def test_conditioning_that_cannot_be_obeyed_is_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    sample = SAMPLES["klein's base"]
    model, _ = plugged(shared_cache, plug, sample)
    recipe, prompt = model.operations.recipe, sample.conditioning["prompt_embeds"]
    wanted = Wanted(1, 128, 128, 3, 3.0)
    for conditioning, asked, says in (
        ({"prompt_embeds": prompt}, wanted, "negative_prompt_embeds is missing: guidance_scale 3 needs one"),
        (
            sample.conditioning,
            dataclasses.replace(wanted, guidance_scale=1.0),
            "negative_prompt_embeds with guidance_scale 1 would have no effect",
        ),
        (
            {"prompt_embeds": prompt, "negative_prompt_embeds": prompt.repeat(2, 1, 1)},
            wanted,
            r"negative_prompt_embeds: shape is \[2, 20, 96\], use \[1, any, 96\]",
        ),
        ({**sample.conditioning, "prompt_embeds": prompt[..., 1:]}, wanted, r"prompt_embeds: shape is \[1, 20, 95\]"),
        ({**sample.conditioning, "prompt_embeds": prompt * float("nan")}, wanted, "prompt_embeds"),
    ):
        with pytest.raises(BadRequest, match=says):
            recipe.start(model, asked, conditioning, sample.noise)


def test_references_that_cannot_be_used_are_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    sample = SAMPLES["dev"]
    model, _ = plugged(shared_cache, plug, sample)
    wanted = Wanted(1, 128, 128, 3, 4.0)
    for references, says in (
        (torch.zeros(128, 4, 4), "reference_latents: Tensor where a list is needed"),
        ([], "reference_latents: list where a list is needed"),
        ([torch.zeros(1, 128, 4, 4)], r"reference_latents\[0\]: shape is \[1, 128, 4, 4\], use \[128, any, any\]"),
        ([torch.zeros(128, 2, 2), torch.zeros(32, 4, 4)], r"reference_latents\[1\]: shape is \[32, 4, 4\]"),
        ([torch.zeros(128, 2, 600)], "use 8192 pixels on a side at most"),
        ([torch.full((128, 2, 2), float("inf"))], r"reference_latents\[0\]: some values are not finite"),
    ):
        with pytest.raises(BadRequest, match=says):
            model.operations.recipe.start(
                model, wanted, {**sample.conditioning, "reference_latents": references}, sample.noise
            )


@pytest.mark.parametrize(
    ("value", "scale", "says"),
    [(2.0, 1.0, "kv_cache 2: use 1, or 0 for none"), (1.0, 3.0, "kv_cache with guidance_scale 3: klein's KV weights")],
)
def test_a_kv_cache_that_cannot_be_obeyed_is_refused(
    shared_cache: ModelCache, plug: Plugger, value: float, scale: float, says: str
) -> None:
    model, _ = plugged(shared_cache, plug, SAMPLES["klein, distilled"])
    with pytest.raises(BadRequest, match=says):
        model.operations.recipe.check(model.config, Wanted(1, 64, 64, 3, scale, options={"kv_cache": value}))
