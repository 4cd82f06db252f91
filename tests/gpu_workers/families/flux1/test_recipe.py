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
from xditd.gpu_workers.models.family import TensorInfo
from xditd.gpu_workers.models.skeletons import Plan, Skeleton, SkeletonCache
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.tensors import ComponentKind

State = dict[str, torch.Tensor]
Plugger = Callable[[SkeletonCache, State], Plan]

BAR = 1e-6
MUTATION_BAR = 10 * BAR
NAN = float("nan")


@pytest.fixture(scope="module")
def pipelines(layout: ParallelLayout) -> ModuleType:
    from xditd.gpu_workers.families.flux1 import pipelines

    return pipelines


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


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("sigmas", [None, [1.0, 0.8125, 0.4, 0.1]], ids=["own schedule", "given sigmas"])
@pytest.mark.parametrize(
    ("tokens", "height", "width", "batch"), [(16, 128, 128, 1), (15, 112, 112, 1), (301, 112, 112, 1), (33, 64, 96, 2)]
)
def test_one_rank_is_bit_identical_to_plain_diffusers(
    cache: SkeletonCache,
    plug: Plugger,
    pipelines: ModuleType,
    guidance: bool,
    sigmas: list[float] | None,
    tokens: int,
    height: int,
    width: int,
    batch: int,
) -> None:
    state = flux1_state_dict(1, guidance=guidance)
    given = job(tokens, height, width, batch)
    ours = pipelines.generate(plug(cache, state).skeleton, **given, steps=4, sigmas=sigmas, guidance_scale=2.5)
    expected = plain(reference.transformer_from(state), given, steps=4, sigmas=sigmas, guidance_scale=2.5)
    assert torch.equal(ours, expected)


def test_bfloat16_is_bit_identical_too(cache: SkeletonCache, plug: Plugger, pipelines: ModuleType) -> None:
    state = flux1_state_dict(1, dtype=torch.bfloat16)
    given = job(15, 64, 64)
    ours = pipelines.generate(plug(cache, state).skeleton, **given, steps=2)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, plain(reference.transformer_from(state), given, steps=2))


class AsComfyUi:
    """diffusers' model in bfloat16, with all that ComfyUI keeps in float32 computed here from scratch."""

    def __init__(self, state: State, given: dict[str, Any], guidance: float) -> None:
        self._model = reference.transformer_from(state)
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
    cache: SkeletonCache, plug: Plugger, pipelines: ModuleType
) -> None:
    from diffusers import FluxPipeline

    state = flux1_state_dict(1, dtype=torch.bfloat16)
    skeleton, given = plug(cache, state).skeleton, job(15, 64, 96)
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
        variant: pipelines.generate(skeleton, **given, steps=4, sigmas=sigmas, guidance_scale=2.6, variant=variant)
        for variant in ("float32_time", "class")
    }
    assert made["float32_time"].dtype == torch.float32
    assert reference.relative_error(made["float32_time"], expected) <= BAR
    assert reference.relative_error(made["class"], expected) > 5e-3
    assert torch.equal(
        made["class"], plain(reference.transformer_from(state), given, steps=4, sigmas=sigmas, guidance_scale=2.6)
    )

    conditioning = pipelines.condition(skeleton, prompt_embeds=given["prompt_embeds"], pooled=given["pooled"])
    for sigma in sigmas:
        velocity = pipelines.denoise(
            skeleton,
            latents=given["noise"],
            timestep=torch.tensor([sigma]),
            conditioning=conditioning,
            guidance=torch.tensor([2.6]),
            variant="float32_time",
        )
        packed = stock.velocity(given["noise"], sigma)
        assert torch.equal(velocity, FluxPipeline._unpack_latents(packed, *size, 1))


def test_in_float32_both_variants_have_the_same_bits(transformer: Skeleton, pipelines: ModuleType) -> None:
    given = job(8, 64, 64)
    both = [pipelines.generate(transformer, **given, steps=3, variant=variant) for variant in ("class", "float32_time")]
    assert torch.equal(*both)


@pytest.mark.parametrize("more", [{}, {"variant": "float32_time"}, {"step_cache": 0.1}], ids=str)
def test_the_first_step_whose_latents_are_not_finite_is_named(
    cache: SkeletonCache, plug: Plugger, pipelines: ModuleType, more: dict[str, Any]
) -> None:
    from xditd.gpu_workers.models.result_checks import FiniteCheck
    from xditd.gpu_workers.models.step_cache import StepCache

    state = flux1_state_dict(2, dtype=torch.bfloat16)
    skeleton, finite = plug(cache, state).skeleton, FiniteCheck()
    component = SimpleNamespace(
        component_id="c1",
        manifest=SimpleNamespace(kind=ComponentKind.TRANSFORMER, label="some"),
        plan=SimpleNamespace(dtype=torch.bfloat16),
    )

    def break_weights(done: int, _: int) -> None:
        if done == 2:
            state["img_in.bias"][5] = torch.nan

    if "step_cache" in more:
        more = {"step_cache": StepCache(more["step_cache"])}
    latents = pipelines.generate(skeleton, **job(8, 64, 64), steps=4, on_step=break_weights, finite=finite, **more)
    assert latents.isnan().any()
    assert "latents after step 3 of 4: some values are NaN" in finite.fault(component).detail


def test_given_sigmas_are_used_as_they_are(transformer: Skeleton, pipelines: ModuleType) -> None:
    given = job(8, 64, 64)
    sigmas = [0.9, 0.7, 0.05]
    result = pipelines.generate(transformer, **given, steps=3, sigmas=sigmas)
    latents = given["noise"]
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        velocity = pipelines.denoise(
            transformer,
            latents=latents,
            timestep=torch.tensor([sigma]),
            conditioning=pipelines.condition(transformer, prompt_embeds=given["prompt_embeds"], pooled=given["pooled"]),
            guidance=torch.tensor([3.5]),
        )
        latents = latents + (following - sigma) * velocity
    assert reference.relative_error(latents, result) <= BAR


def test_seeded_noise_is_what_a_diffusers_pipeline_draws(transformer: Skeleton, pipelines: ModuleType) -> None:
    from diffusers import FluxPipeline

    drawer = pipelines._pipeline(transformer, None)
    generator = torch.Generator("cpu").manual_seed(7)
    packed, _ = drawer.prepare_latents(2, 16, 64, 96, torch.float32, torch.device("cpu"), generator)
    ours = pipelines.seeded_noise(7, batch=2, height=64, width=96)
    assert torch.equal(ours, FluxPipeline._unpack_latents(packed, 64, 96, 8))


def test_steps_are_reported_and_a_stopped_job_leaves_no_trace(transformer: Skeleton, pipelines: ModuleType) -> None:
    class Stop(Exception):
        pass

    given = job(8, 64, 64)
    seen: list[tuple[int, int]] = []
    first = pipelines.generate(transformer, **given, steps=3, on_step=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop_at_two(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        pipelines.generate(transformer, **given, steps=3, on_step=stop_at_two)
    assert torch.equal(pipelines.generate(transformer, **given, steps=3), first)


def test_each_step_shows_what_it_takes_the_clean_latents_for(transformer: Skeleton, pipelines: ModuleType) -> None:
    given = job(8, 64, 64)
    sigmas = [0.9, 0.7, 0.05]
    seen: list[torch.Tensor] = []
    result = pipelines.generate(transformer, **given, steps=3, sigmas=sigmas, on_denoised=seen.append)
    assert torch.equal(pipelines.generate(transformer, **given, steps=3, sigmas=sigmas), result)
    latents = given["noise"]
    for sigma, following, denoised in zip(sigmas, [*sigmas[1:], 0.0], seen, strict=True):
        velocity = pipelines.denoise(
            transformer,
            latents=latents,
            timestep=torch.tensor([sigma]),
            conditioning=pipelines.condition(transformer, prompt_embeds=given["prompt_embeds"], pooled=given["pooled"]),
            guidance=torch.tensor([3.5]),
        )
        assert reference.relative_error(denoised, latents - sigma * velocity) <= BAR
        latents = latents + (following - sigma) * velocity
    assert reference.relative_error(seen[-1], result) <= BAR


def test_guidance_is_ignored_without_guidance_tensors(
    cache: SkeletonCache, plug: Plugger, pipelines: ModuleType
) -> None:
    skeleton = plug(cache, flux1_state_dict(0, guidance=False)).skeleton
    given = job(8, 64, 64)
    one, other = (pipelines.generate(skeleton, **given, steps=1, guidance_scale=scale) for scale in (1.0, 9.0))
    assert torch.equal(one, other)


def test_zeroing_any_tensor_of_the_transformer_shows_in_the_latents(
    shared_cache: SkeletonCache, demo_transformer: State, plug: Plugger, pipelines: ModuleType
) -> None:
    given = job(8, 64, 64)
    expected = plain(reference.transformer_from(demo_transformer), given, steps=2)
    figures: dict[str, float] = {}
    for name, tensor in demo_transformer.items():
        skeleton = plug(shared_cache, {**demo_transformer, name: torch.zeros_like(tensor)}).skeleton
        figures[name] = reference.relative_error(pipelines.generate(skeleton, **given, steps=2), expected)
    assert len(figures) == 84
    assert {name: figure for name, figure in figures.items() if figure < MUTATION_BAR} == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 120}, "height 120: use a multiple of 16"),
        ({"width": 0}, "width 0"),
        ({"width": -16}, "width -16"),
        ({"height": 16 * 10**6}, "height 16000000"),
        ({"width": limits.MAX_SIDE_PIXELS + 16}, f"up to {limits.MAX_SIDE_PIXELS} pixels"),
        ({"steps": 0}, "steps 0: use 1 to 1000"),
        ({"steps": 10**9}, "steps 1000000000"),
        ({"steps": limits.MAX_STEPS + 1}, f"use 1 to {limits.MAX_STEPS}"),
        ({"steps": 3, "sigmas": [1.0, 0.5]}, "2 sigmas for 3 steps"),
        ({"steps": 2, "sigmas": [1.0, 0.0]}, "sigma 0.0"),
        ({"steps": 2, "sigmas": [1.5, 0.5]}, "sigma 1.5"),
        ({"steps": 2, "sigmas": [NAN, 0.5]}, "sigma nan"),
        ({"steps": 2, "sigmas": [0.5, 0.5]}, "sigmas do not fall"),
        ({"guidance_scale": math.inf}, "guidance_scale inf"),
        ({"prompt_embeds": torch.zeros(1, 8, 4095)}, r"prompt_embeds are \[1, 8, 4095\]: use \[batch, tokens, 4096\]"),
        ({"prompt_embeds": torch.zeros(1, 0, 4096)}, r"prompt_embeds are \[1, 0, 4096\]"),
        ({"prompt_embeds": torch.full((1, 8, 4096), NAN)}, "prompt_embeds: some values are not finite"),
        ({"prompt_embeds": torch.zeros(1, 8, 4096, dtype=torch.int64)}, "prompt_embeds: dtype is torch.int64"),
        ({"pooled": torch.zeros(2, 768)}, r"pooled_prompt_embeds: shape is \[2, 768\], use \[1, 768\]"),
        ({"pooled": torch.full((1, 768), math.inf)}, "pooled_prompt_embeds: some values are not finite"),
        ({"noise": torch.zeros(1, 16, 8, 9)}, r"noise: shape is \[1, 16, 8, 9\], use \[1, 16, 8, 8\]"),
        ({"noise": torch.full((1, 16, 8, 8), NAN)}, "noise: some values are not finite"),
    ],
)
def test_bad_generate_requests_name_the_value(
    transformer: Skeleton, pipelines: ModuleType, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        pipelines.generate(transformer, **{**job(8, 64, 64), "steps": 1, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(1, 16, 8, 7)}, "even height, even width"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents: shape is \[1, 4, 8, 8\]"),
        ({"latents": torch.zeros(2, 16, 8, 8)}, r"latents: shape is \[2, 16, 8, 8\]"),
        ({"latents": torch.full((1, 16, 8, 8), NAN)}, "latents: some values are not finite"),
        ({"timestep": torch.tensor([0.5, 0.5])}, r"timestep: shape is \[2\]"),
        ({"timestep": torch.tensor([500.0])}, "timestep: some values are not finite numbers from 0.0 to 1.0"),
        ({"timestep": torch.tensor([NAN])}, "timestep: some values"),
        ({"guidance": None}, "guidance is missing"),
        ({"guidance": torch.tensor([NAN])}, "guidance: some values"),
    ],
)
def test_bad_denoise_requests_name_the_value(
    transformer: Skeleton, pipelines: ModuleType, changes: dict[str, Any], message: str
) -> None:
    given = job(8, 64, 64)
    arguments = {
        "latents": given["noise"],
        "timestep": torch.tensor([0.5]),
        "conditioning": pipelines.condition(transformer, prompt_embeds=given["prompt_embeds"], pooled=given["pooled"]),
        "guidance": torch.tensor([3.5]),
    }
    pipelines.denoise(transformer, **arguments)
    with pytest.raises(BadRequest, match=message):
        pipelines.denoise(transformer, **{**arguments, **changes})


def test_bad_seeds_and_batches_name_the_value(pipelines: ModuleType) -> None:
    for seed in (-1, 2**64):
        with pytest.raises(BadRequest, match=f"seed {seed}"):
            pipelines.seeded_noise(seed, batch=1, height=16, width=16)
    for batch in (0, 65):
        with pytest.raises(BadRequest, match=f"batch {batch}"):
            pipelines.seeded_noise(0, batch=batch, height=16, width=16)


def test_a_component_of_the_wrong_kind_is_refused(vae: Skeleton, pipelines: ModuleType) -> None:
    with pytest.raises(BadRequest, match="needs a transformer, but the component is a vae"):
        pipelines.generate(vae, **job(8, 64, 64), steps=1)


def test_a_good_job_after_bad_ones_has_the_same_bits(
    transformer: Skeleton, demo_transformer: State, pipelines: ModuleType
) -> None:
    given = job(8, 64, 64)
    with pytest.raises(BadRequest):
        pipelines.generate(transformer, **{**given, "noise": torch.full((1, 16, 8, 8), NAN)}, steps=2)
    expected = plain(reference.transformer_from(demo_transformer), given, steps=2)
    assert torch.equal(pipelines.generate(transformer, **given, steps=2), expected)


def test_inputs_of_another_dtype_are_cast(transformer: Skeleton, pipelines: ModuleType) -> None:
    given = job(8, 64, 64)
    half = {name: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    widened = {name: v.float() if isinstance(v, torch.Tensor) else v for name, v in half.items()}
    assert torch.equal(
        pipelines.generate(transformer, **half, steps=1), pipelines.generate(transformer, **widened, steps=1)
    )


def test_described_dtype_matches_torch_names() -> None:
    assert TensorInfo.of(torch.zeros(2, 3, dtype=torch.float8_e4m3fn)) == TensorInfo("float8_e4m3fn", (2, 3))
