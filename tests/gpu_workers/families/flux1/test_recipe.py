"""One rank against plain diffusers, bit for bit; every tensor matters; bad input is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.ipc.errors import BadRequest

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]

BAR = 1e-6
MUTATION_BAR = 10 * BAR
NAN = float("nan")


def job(tokens: int, height: int, width: int, batch: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    return {
        "prompt_embeds": torch.randn(batch, tokens, 4096, generator=generator),
        "pooled": torch.randn(batch, 768, generator=generator),
        "noise": torch.randn(batch, 16, height // 8, width // 8, generator=generator),
        "height": height,
        "width": width,
    }


def plain(model: Any, given: dict[str, Any], **rest: Any) -> torch.Tensor:
    renamed = {"pooled_prompt_embeds" if name == "pooled" else name: value for name, value in given.items()}
    return reference.reference_latents(model, **renamed, **rest)


SIZES = [(16, 128, 128, 1), (15, 112, 112, 1), (301, 112, 112, 1), (33, 64, 96, 2)]
QUICK = {("dev", "own schedule", size) for size in SIZES}
QUICK |= {(model, "given sigmas", SIZES[3]) for model in ("dev", "schnell")} | {("schnell", "own schedule", SIZES[1])}
"""The model, the schedule, and the number of tokens, sides and rows that each test run covers."""


@pytest.mark.parametrize(
    ("guidance", "sigmas", "tokens", "height", "width", "batch"),
    [
        pytest.param(
            model == "dev",
            [1.0, 0.8125, 0.4, 0.1] if schedule == "given sigmas" else None,
            *size,
            marks=() if (model, schedule, size) in QUICK else pytest.mark.long,
            id="-".join([*map(str, size), schedule, model]),
        )
        for size in SIZES
        for schedule in ("own schedule", "given sigmas")
        for model in ("dev", "schnell")
    ],
)
def test_one_rank_is_bit_identical_to_plain_diffusers(
    cache: ModelCache,
    plug: Plugger,
    direct: ModuleType,
    guidance: bool,
    sigmas: list[float] | None,
    tokens: int,
    height: int,
    width: int,
    batch: int,
) -> None:
    state = flux1_state_dict(1, guidance=guidance)
    given = job(tokens, height, width, batch)
    ours = direct.generate(plug(cache, state).model, **given, steps=4, sigmas=sigmas, guidance_scale=2.5)
    expected = plain(reference.transformer_from(state), given, steps=4, sigmas=sigmas, guidance_scale=2.5)
    assert torch.equal(ours, expected)


def test_bfloat16_is_bit_identical_too(cache: ModelCache, plug: Plugger, direct: ModuleType) -> None:
    state = flux1_state_dict(1, dtype=torch.bfloat16)
    given = job(15, 64, 64)
    ours = direct.generate(plug(cache, state).model, **given, steps=2)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, plain(reference.transformer_from(state), given, steps=2))


def set_epsilon(model: torch.nn.Module) -> None:
    """Give query and key norms the epsilon that ComfyUI's have, torch's default."""
    for path, each in model.named_modules():
        if path.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            each.eps = None  # type: ignore[assignment]


class AsComfyUi:
    """diffusers' model in bfloat16, with all that ComfyUI keeps in float32 computed here from scratch."""

    def __init__(self, state: State, given: dict[str, Any], guidance: float) -> None:
        self._model = reference.transformer_from(state)
        set_epsilon(self._model)
        self._embedders = self._model.time_text_embed
        self._given = {name: given[name].bfloat16() for name in ("prompt_embeds", "pooled")}
        self._guidance = guidance

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Take float32 latents (1, 16, h, w), and return what the model predicts, in bfloat16, packed."""
        from diffusers import FluxPipeline

        embed, pooled = self._embedders, self._given["pooled"]
        scaled = torch.tensor([self._guidance]).bfloat16() * 1000  # guidance is rounded by both
        vectors = (
            embed.timestep_embedder(waves(torch.tensor([sigma]) * 1000).bfloat16())
            + embed.guidance_embedder(waves(scaled.float()).bfloat16())
            + embed.text_embedder(pooled)
        )

        class Ready(torch.nn.Module):
            def forward(self, *_: torch.Tensor) -> torch.Tensor:
                return vectors

        self._model.time_text_embed = Ready()
        height, width = latents.shape[2:]
        return self._model(
            hidden_states=FluxPipeline._pack_latents(latents.bfloat16(), *latents.shape),
            encoder_hidden_states=self._given["prompt_embeds"],
            pooled_projections=pooled,
            timestep=torch.tensor([sigma]),
            guidance=torch.tensor([self._guidance]),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(self._given["prompt_embeds"].shape[1], 3),
            return_dict=False,
        )[0]


def waves(scaled: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of 128 frequencies from 1 down to nearly 1 / 10,000."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = scaled[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def test_float32_time_in_bfloat16_is_what_comfyui_computes(
    cache: ModelCache, plug: Plugger, direct: ModuleType
) -> None:
    from diffusers import FluxPipeline

    state = flux1_state_dict(1, dtype=torch.bfloat16)
    model, given = plug(cache, state).model, job(15, 64, 96)
    sigmas = [0.9871, 0.7313, 0.4457, 0.1237]  # no multiples of what bfloat16 rounds to
    stock = AsComfyUi(state, given, guidance=2.6)
    size = given["noise"].shape[2:]

    expected = FluxPipeline._pack_latents(given["noise"], *given["noise"].shape)
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        unpacked = FluxPipeline._unpack_latents(expected, *size, 1)
        difference = torch.tensor(following) - torch.tensor(sigma)
        expected = expected + difference * stock.velocity(unpacked, sigma).float()
    expected = FluxPipeline._unpack_latents(expected, *size, 1)
    made = {
        variant: direct.generate(model, **given, steps=4, sigmas=sigmas, guidance_scale=2.6, variant=variant)
        for variant in ("float32_time", "class")
    }
    assert made["float32_time"].dtype == torch.float32
    assert reference.relative_error(made["float32_time"], expected) <= BAR
    assert reference.relative_error(made["class"], expected) > 5e-3
    assert torch.equal(
        made["class"], plain(reference.transformer_from(state), given, steps=4, sigmas=sigmas, guidance_scale=2.6)
    )

    for sigma in sigmas:
        velocity = direct.denoise(
            model,
            latents=given["noise"],
            timestep=torch.tensor([sigma]),
            prompt_embeds=given["prompt_embeds"],
            pooled=given["pooled"],
            guidance=torch.tensor([2.6]),
            variant="float32_time",
        )
        packed = stock.velocity(given["noise"], sigma)
        assert torch.equal(velocity, FluxPipeline._unpack_latents(packed, *size, 1))


def test_in_float32_the_variants_differ_by_the_epsilon_of_norms(
    cache: ModelCache, plug: Plugger, direct: ModuleType
) -> None:
    state, given = flux1_state_dict(1), job(8, 64, 64)
    model = plug(cache, state).model
    found = {
        variant: direct.generate(model, **given, steps=3, variant=variant)
        for variant in ("class", "float32_time", "class")
    }
    expected = reference.transformer_from(state)
    assert torch.equal(found["class"], plain(expected, given, steps=3))
    set_epsilon(expected)
    assert torch.equal(found["float32_time"], plain(expected, given, steps=3))
    assert 0 < reference.relative_error(*found.values()) < 1e-5


@pytest.mark.parametrize("more", [{}, {"variant": "float32_time"}, {"step_cache": 0.1}], ids=str)
def test_the_first_step_whose_latents_are_not_finite_is_named(
    cache: ModelCache, plug: Plugger, direct: ModuleType, more: dict[str, Any]
) -> None:
    from xditd.gpu_workers.models.result_checks import FiniteCheck
    from xditd.gpu_workers.models.step_cache import StepCache

    state = flux1_state_dict(2, dtype=torch.bfloat16)
    model, finite = plug(cache, state).model, FiniteCheck()
    component = SimpleNamespace(
        component_id="c1",
        manifest=SimpleNamespace(label="some"),
        match=SimpleNamespace(dtype=torch.bfloat16, family=model.family),
    )

    def break_weights(done: int, _: int) -> None:
        if done == 2:
            state["img_in.bias"][5] = torch.nan

    if "step_cache" in more:
        more = {"step_cache": StepCache(more["step_cache"])}
    latents = direct.generate(model, **job(8, 64, 64), steps=4, on_step=break_weights, finite=finite, **more)
    assert latents.isnan().any()
    assert "latents after step 3 of 4: some values are NaN" in finite.fault(component).detail


def test_given_sigmas_are_used_as_they_are(transformer: CachedModel, direct: ModuleType) -> None:
    given = job(8, 64, 64)
    sigmas = [0.9, 0.7, 0.05]
    result = direct.generate(transformer, **given, steps=3, sigmas=sigmas)
    latents = given["noise"]
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        velocity = direct.denoise(
            transformer,
            latents=latents,
            timestep=torch.tensor([sigma]),
            prompt_embeds=given["prompt_embeds"],
            pooled=given["pooled"],
            guidance=torch.tensor([3.5]),
        )
        latents = latents + (following - sigma) * velocity
    assert reference.relative_error(latents, result) <= BAR


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seeded_noise_is_what_a_diffusers_pipeline_draws(dtype: torch.dtype) -> None:
    from diffusers import FluxPipeline

    from xditd.gpu_workers.jobs.generation_inputs import seeded_noise

    drawer = FluxPipeline(None, None, None, None, None, None, None)
    generator = torch.Generator("cpu").manual_seed(7)
    packed, _ = drawer.prepare_latents(2, 16, 64, 96, dtype, torch.device("cpu"), generator)
    ours = seeded_noise(7, (2, 16, 8, 12), dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, FluxPipeline._unpack_latents(packed, 64, 96, 8))


def test_steps_are_reported_and_a_stopped_job_leaves_no_trace(transformer: CachedModel, direct: ModuleType) -> None:
    class Stop(Exception):
        pass

    given = job(8, 64, 64)
    seen: list[tuple[int, int]] = []
    first = direct.generate(transformer, **given, steps=3, on_step=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop_at_two(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        direct.generate(transformer, **given, steps=3, on_step=stop_at_two)
    assert torch.equal(direct.generate(transformer, **given, steps=3), first)


def test_each_step_shows_what_it_takes_the_clean_latents_for(transformer: CachedModel, direct: ModuleType) -> None:
    given = job(8, 64, 64)
    sigmas = [0.9, 0.7, 0.05]
    seen: list[torch.Tensor] = []
    result = direct.generate(transformer, **given, steps=3, sigmas=sigmas, on_denoised=seen.append)
    assert torch.equal(direct.generate(transformer, **given, steps=3, sigmas=sigmas), result)
    latents = given["noise"]
    for sigma, following, denoised in zip(sigmas, [*sigmas[1:], 0.0], seen, strict=True):
        velocity = direct.denoise(
            transformer,
            latents=latents,
            timestep=torch.tensor([sigma]),
            prompt_embeds=given["prompt_embeds"],
            pooled=given["pooled"],
            guidance=torch.tensor([3.5]),
        )
        assert reference.relative_error(denoised, latents - sigma * velocity) <= BAR
        latents = latents + (following - sigma) * velocity
    assert reference.relative_error(seen[-1], result) <= BAR


def test_guidance_is_ignored_without_guidance_tensors(cache: ModelCache, plug: Plugger, direct: ModuleType) -> None:
    model = plug(cache, flux1_state_dict(0, guidance=False)).model
    given = job(8, 64, 64)
    one, other = (direct.generate(model, **given, steps=1, guidance_scale=scale) for scale in (1.0, 9.0))
    assert torch.equal(one, other)


def test_zeroing_any_tensor_of_the_transformer_shows_in_the_latents(
    shared_cache: ModelCache, demo_transformer: State, plug: Plugger, direct: ModuleType
) -> None:
    given = job(8, 64, 64)
    expected = plain(reference.transformer_from(demo_transformer), given, steps=2)
    figures: dict[str, float] = {}
    for name, tensor in demo_transformer.items():
        model = plug(shared_cache, {**demo_transformer, name: torch.zeros_like(tensor)}).model
        figures[name] = reference.relative_error(direct.generate(model, **given, steps=2), expected)
    assert len(figures) == 84
    assert {name: figure for name, figure in figures.items() if figure < MUTATION_BAR} == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_embeds": torch.zeros(1, 8, 4095)},
            r"prompt_embeds: shape is \[1, 8, 4095\], use \[1, any, 4096\]",
        ),
        ({"prompt_embeds": torch.zeros(1, 0, 4096)}, r"prompt_embeds: shape is \[1, 0, 4096\]"),
        ({"prompt_embeds": torch.zeros(2, 8, 4096)}, r"prompt_embeds: shape is \[2, 8, 4096\], use \[1, any"),
        ({"prompt_embeds": torch.full((1, 8, 4096), NAN)}, "prompt_embeds: some values are not finite in float32"),
        (
            {"prompt_embeds": torch.zeros(1, 8, 4096, dtype=torch.int64)},
            "prompt_embeds: dtype is int64, use a floating dtype",
        ),
        ({"pooled": torch.zeros(2, 768)}, r"pooled_prompt_embeds: shape is \[2, 768\], use \[1, 768\]"),
        ({"pooled": torch.full((1, 768), math.inf)}, "pooled_prompt_embeds: some values are not finite"),
    ],
)
def test_bad_conditioning_is_refused_by_name_and_value(
    transformer: CachedModel, direct: ModuleType, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        direct.generate(transformer, **{**job(8, 64, 64), "steps": 1, **changes})


def test_conditioning_that_overflows_in_the_weights_dtype_is_refused(
    cache: ModelCache, plug: Plugger, direct: ModuleType
) -> None:
    model = plug(cache, flux1_state_dict(0, dtype=torch.float16, double_blocks=1, single_blocks=1)).model
    given = job(8, 64, 64)
    given["pooled"][0, 3] = 70_000.0
    with pytest.raises(BadRequest, match="pooled_prompt_embeds: some values are not finite in float16"):
        direct.generate(model, **given, steps=1)


def test_what_is_foreseen_is_what_the_forwards_are_given(transformer: CachedModel) -> None:
    """Else fused blocks would make ready for other timesteps than those that come."""
    from xditd.gpu_workers.models.operations import Wanted

    operations: Any = transformer.operations
    given = job(8, 64, 64)
    conditioning = {"prompt_embeds": given["prompt_embeds"], "pooled_prompt_embeds": given["pooled"]}
    run = operations.recipe.start(transformer, Wanted(1, 64, 64, 5, 3.5), conditioning, given["noise"])
    for step in range(5):
        (part,) = run.parts(run.latents, step)
        assert tuple(part.arguments["timestep"].tolist()) == part.known["timestep"]
        assert part.known["timestep"] == run.foreseen["timestep"][step : step + 1]
        assert tuple(part.arguments["guidance"].tolist()) == part.known["guidance"] == (3.5,)
        operations.check(transformer, part)


def test_a_good_job_after_bad_ones_has_the_same_bits(
    transformer: CachedModel, demo_transformer: State, direct: ModuleType
) -> None:
    given = job(8, 64, 64)
    with pytest.raises(BadRequest):
        direct.generate(transformer, **{**given, "pooled": torch.full((1, 768), NAN)}, steps=2)
    expected = plain(reference.transformer_from(demo_transformer), given, steps=2)
    assert torch.equal(direct.generate(transformer, **given, steps=2), expected)


def test_inputs_of_another_dtype_are_cast(transformer: CachedModel, direct: ModuleType) -> None:
    given = job(8, 64, 64)
    half = {name: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    widened = {name: v.float() if isinstance(v, torch.Tensor) else v for name, v in half.items()}
    assert torch.equal(direct.generate(transformer, **half, steps=1), direct.generate(transformer, **widened, steps=1))


def test_described_dtype_matches_torch_names() -> None:
    assert TensorInfo.of(torch.zeros(2, 3, dtype=torch.float8_e4m3fn)) == TensorInfo("float8_e4m3fn", (2, 3))
