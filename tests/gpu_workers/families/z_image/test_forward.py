"""One rank gives the bits of diffusers' own class and pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import z_image_models

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Wanted
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
COMFYUI = ("layers.0.attention.qkv.weight",)

CALLS = {
    "a text that divides": ((32,), ((8, 8),)),
    "an odd text, an image that is padded": ((7,), ((6, 10),)),
    "two rows of equal texts": ((40, 40), ((8, 12),) * 2),
    "two rows of unequal texts that pad alike": ((33, 60), ((8, 12),) * 2),
    "two rows of unequal texts": ((5, 70), ((8, 12),) * 2),
    "two rows of unequal images": ((20, 20), ((8, 12), (4, 4))),
    "all unequal": ((20, 90, 33), ((8, 12), (4, 4), (16, 16))),
}


@pytest.fixture(scope="module")
def state() -> State:
    return z_image_models.state_dict(0)


@pytest.fixture(scope="module")
def reference(state: State) -> Any:
    return z_image_models.reference(state)


@pytest.fixture
def model(shared_cache: ModelCache, state: State, plug: Plugger) -> CachedModel:
    return plug(shared_cache, state).model


def run(model: CachedModel, given: Mapping[str, Any], **more: Any) -> list[torch.Tensor]:
    import direct_jobs  # not before the group is started

    ((rows,),) = direct_jobs.call(model, [Inputs(given)], **more)
    return rows


def generate(model: CachedModel, wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor) -> torch.Tensor:
    import direct_jobs

    return direct_jobs.generate_from(
        model,
        conditioning,
        noise,
        height=wanted.height,
        width=wanted.width,
        steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        sigmas=wanted.sigmas,
        options=dict(wanted.options),
        variant=wanted.variant,
    )


@pytest.mark.parametrize("case", list(CALLS))
def test_a_call_gives_the_bits_of_the_class(model: CachedModel, reference: Any, case: str) -> None:
    given = z_image_models.inputs(*CALLS[case])
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    found = run(model, given)
    assert len(found) == len(expected)
    assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", list(CALLS))
def test_the_shared_forward_is_the_same_function(model: CachedModel, reference: Any, case: str) -> None:
    given = z_image_models.inputs(*CALLS[case])
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
        found = model.module.forward_shared(**given)
    for ours, right in zip(found, expected, strict=True):
        assert ours.shape == right.shape
        assert z_image_models.relative_error(ours, right) <= 1e-6


def test_both_layouts_give_the_same_bits(shared_cache: ModelCache, model: CachedModel, plug: Plugger) -> None:
    given = z_image_models.inputs(*CALLS["all unequal"])
    fused = z_image_models.state_dict(3, names=COMFYUI, prefix="model.diffusion_model.")
    match = plug(shared_cache, fused)
    assert match.model is model
    found = run(model, given)
    with torch.no_grad():
        expected = z_image_models.reference(fused)(**given, return_dict=False)[0]
    assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))


def test_comfyuis_variant_has_its_epsilon_and_its_time(model: CachedModel) -> None:
    given = z_image_models.inputs(*CALLS["two rows of equal texts"])
    plain = run(model, given)
    module = z_image_models.reference(z_image_models.state_dict(0))
    for block in (*module.noise_refiner, *module.context_refiner, *module.layers):
        block.attention.norm_q.eps = block.attention.norm_k.eps = torch.finfo(torch.float32).eps
    with torch.no_grad():
        expected = module(**given, return_dict=False)[0]
    found = run(model, given, variant="comfyui")
    assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))
    assert not any(map(torch.equal, found, plain))
    assert all(map(torch.equal, run(model, given), plain))

    sigmas = (1.0, 0.7, 0.31)
    wanted = Wanted(1, 64, 64, 3, 0.0, sigmas=sigmas, variant="comfyui")
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    started = model.operations.recipe.start(model, wanted, {"prompt_embeds": given["cap_feats"][:1]}, noise)
    for step, sigma in enumerate(torch.tensor(sigmas)):
        (part,) = started.parts(noise, step)
        assert torch.equal(part.arguments["t"], 1.0 - sigma[None])


def test_rows_are_taken_as_views(model: CachedModel) -> None:
    given = z_image_models.inputs(*CALLS["all unequal"])
    operations = model.operations
    whole = run(model, given)
    taken = operations.take_rows(Inputs(given, {"t": (0.2, 0.45, 0.7)}), slice(1, 3))
    assert taken.known == {"t": (0.45, 0.7)}
    assert taken.arguments["t"].data_ptr() == given["t"][1:].data_ptr()
    rows = operations.run(model, taken, CallOptions())
    for ours, right in zip(rows, whole[1:], strict=True):
        assert z_image_models.relative_error(ours, right) <= 1e-6


SAMPLES: dict[str, tuple[tuple[int, ...], tuple[int, int], dict[str, Any], dict[str, Any], float]] = {
    # texts (prompts, then negatives), latent size, the pipeline's arguments, ours, the scheduler's shift
    "Turbo": ((20,), (16, 16), {"guidance_scale": 0.0}, {}, 3.0),
    "Turbo, batch of two unequal texts": ((33, 7), (8, 12), {"guidance_scale": 0.0}, {}, 3.0),
    "Base": ((40, 33), (16, 16), {"guidance_scale": 5.0}, {}, 6.0),
    "Base, negative of another length": ((40, 7), (8, 12), {"guidance_scale": 5.0}, {}, 6.0),
    "Base, batch of two": ((40, 70, 7, 7), (8, 12), {"guidance_scale": 4.0}, {}, 6.0),
    "normalized": (
        (40, 70, 7, 7),
        (8, 12),
        {"guidance_scale": 4.0, "cfg_normalization": True},
        {"cfg_normalization": 1.0},
        6.0,
    ),
    "normalized to more": (
        (40, 7),
        (8, 12),
        {"guidance_scale": 4.0, "cfg_normalization": 100.0},
        {"cfg_normalization": 100.0},
        6.0,
    ),
    "truncated": ((40, 7), (8, 12), {"guidance_scale": 4.0, "cfg_truncation": 0.2}, {"cfg_truncation": 0.2}, 6.0),
    "not truncated": ((40, 7), (8, 12), {"guidance_scale": 4.0, "cfg_truncation": 2.0}, {"cfg_truncation": 2.0}, 6.0),
    "another shift": ((20,), (8, 8), {"guidance_scale": 0.0}, {"shift": 1.5}, 1.5),
    "given sigmas": ((20,), (8, 8), {"guidance_scale": 0.0, "sigmas": [1.0, 0.7, 0.31]}, {}, 1.0),
}


def asked(case: str, dtype: torch.dtype = torch.float32) -> tuple[Wanted, dict[str, Any], Any]:
    texts, (height, width), given, options, _ = SAMPLES[case]
    is_guided = given["guidance_scale"] > 0
    batch = len(texts) // 2 if is_guided else len(texts)
    embeds = [each.to(dtype) for each in z_image_models.inputs(texts, ((height, width),))["cap_feats"]]
    conditioning = {"prompt_embeds": embeds[:batch]}
    if is_guided:
        conditioning["negative_prompt_embeds"] = embeds[batch:]
    sigmas = given.get("sigmas")
    wanted = Wanted(
        batch=batch,
        height=height * 8,
        width=width * 8,
        steps=3,
        guidance_scale=given["guidance_scale"],
        sigmas=None if sigmas is None else tuple(sigmas),
        options=options,
    )
    noise = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(1))
    return wanted, conditioning, noise


@pytest.mark.parametrize("case", list(SAMPLES))
def test_generating_gives_the_bits_of_the_pipeline(model: CachedModel, reference: Any, case: str) -> None:
    wanted, conditioning, noise = asked(case)
    found = generate(model, wanted, conditioning, noise)
    *_, given, _, shift = SAMPLES[case]
    expected = z_image_models.pipeline_latents(
        reference, shift=shift, noise=noise, steps=wanted.steps, conditioning=conditioning, **given
    )
    assert torch.equal(found, expected)


def test_bfloat16_weights_keep_latents_in_float32(shared_cache: ModelCache, plug: Plugger) -> None:
    rounded = z_image_models.state_dict(0, dtype=torch.bfloat16)
    model = plug(shared_cache, rounded).model
    assert model.operations.recipe.noise_dtype(model.dtype, "class") == torch.float32
    wanted, conditioning, noise = asked("Base, batch of two", torch.bfloat16)
    found = generate(model, wanted, conditioning, noise)
    *_, given, _, shift = SAMPLES["Base, batch of two"]
    expected = z_image_models.pipeline_latents(
        z_image_models.reference(rounded), shift=shift, noise=noise, steps=3, conditioning=conditioning, **given
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_options_change_the_result(model: CachedModel) -> None:
    wanted, conditioning, noise = asked("Base")
    plain = generate(model, wanted, conditioning, noise)
    for name, value in (("shift", 3.0), ("cfg_normalization", 0.9), ("cfg_truncation", 0.1)):
        changed = Wanted(1, 128, 128, 3, 5.0, options={name: value})
        assert z_image_models.relative_error(generate(model, changed, conditioning, noise), plain) > 1e-3, name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.ones(1, 16, 1, 8, 8)}, "x: Tensor where a list is needed"),
        ({"x": []}, "x: a batch of 0"),
        ({"x": [torch.ones(16, 1, 8, 7)]}, r"x\[0\]: shape is \[16, 1, 8, 7\], use multiples of 2 up to 1024"),
        ({"x": [torch.ones(16, 1, 8, 1026)]}, r"use multiples of 2 up to 1024 on a side"),
        ({"x": [torch.ones(16, 2, 8, 8)]}, r"x\[0\]: shape is \[16, 2, 8, 8\], use \[16, 1, any, any\]"),
        ({"x": [torch.ones(16, 1, 8, 8, dtype=torch.bfloat16)]}, "dtype is bfloat16, use float32"),
        ({"x": [torch.ones(16, 1, 8, 8)] * 2}, "cap_feats: 1 rows, use 2, one for each image"),
        ({"cap_feats": [torch.ones(20, 63)]}, r"cap_feats\[0\]: shape is \[20, 63\], use \[any, 64\]"),
        ({"cap_feats": [torch.ones(0, 64)]}, r"cap_feats\[0\]: shape is \[0, 64\]"),
        ({"cap_feats": [torch.ones(1505, 64)]}, r"cap_feats\[0\]: 1505 tokens, use 1504 at most"),
        ({"cap_feats": ["text"]}, r"cap_feats\[0\]: str where a tensor is needed"),
        ({"t": torch.ones(2)}, r"t: shape is \[2\], use \[1\]"),
        ({"t": 0.5}, "t: float where a tensor is needed"),
    ],
)
def test_arguments_that_cannot_run_are_refused(model: CachedModel, changes: dict[str, Any], says: str) -> None:
    given = {**z_image_models.inputs((20,), ((8, 8),)), **changes}
    with pytest.raises(BadRequest, match=says):
        model.operations.check(model, Inputs(given))


def test_the_longest_text_and_side_have_positions(model: CachedModel) -> None:
    found = run(model, z_image_models.inputs((1504,), ((2, 1024),)))
    assert found[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "sigmas", "says"),
    [
        ({"shift": 0.0}, None, "shift 0: use a number above 0, such as 3 or 6"),
        ({"shift": 3.0}, (1.0, 0.5, 0.1), "shift 3 with sigmas"),
        ({"cfg_normalization": -1.0}, None, "cfg_normalization -1: use 0 for none, or more"),
    ],
)
def test_options_that_cannot_be_obeyed_are_refused(
    model: CachedModel, options: dict[str, float], sigmas: tuple[float, ...] | None, says: str
) -> None:
    wanted = Wanted(1, 64, 64, 3, 0.0, sigmas=sigmas, options=options)
    with pytest.raises(BadRequest, match=says):
        model.operations.recipe.check(model.config, wanted)


def test_conditioning_that_cannot_be_obeyed_is_refused(model: CachedModel) -> None:
    recipe = model.operations.recipe
    wanted, conditioning, noise = asked("Base")
    prompt = {"prompt_embeds": conditioning["prompt_embeds"]}
    with pytest.raises(BadRequest, match="negative_prompt_embeds is missing: guidance_scale 5 needs one"):
        recipe.start(model, wanted, prompt, noise)
    both = {**prompt, "negative_prompt_embeds": conditioning["prompt_embeds"] * 2}
    with pytest.raises(BadRequest, match="negative_prompt_embeds: 2 rows, use 1"):
        recipe.start(model, wanted, both, noise)
    with pytest.raises(BadRequest, match="negative_prompt_embeds with guidance_scale 0 would have no effect"):
        recipe.start(model, Wanted(1, 128, 128, 3, 0.0), conditioning, noise)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"precision": "fp8"},
            "precision 'fp8': Z-Image has no products in eight bits; start the daemon with precision bf16",
        ),
        ({"requested_kernels": "fused"}, "kernels 'fused': Z-Image has none; start the daemon with kernels auto"),
    ],
)
def test_kernels_that_are_not_there_are_refused(
    layout: ParallelLayout, state: State, changes: dict[str, str], says: str
) -> None:
    cache = ModelCache(dataclasses.replace(layout, **changes))
    with pytest.raises(Unsupported, match=says):
        cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})


def test_an_attention_backend_that_was_asked_for_runs(layout: ParallelLayout, state: State, plug: Plugger) -> None:
    asked_for = dataclasses.replace(layout, requested_attention="SDPA_MATH", attention_backend="SDPA_MATH")
    model = plug(ModelCache(asked_for), state).model
    given = z_image_models.inputs(*CALLS["two rows of unequal texts"])
    with torch.no_grad():
        expected = z_image_models.reference(state)(**given, return_dict=False)[0]
    found = run(model, given)
    assert not all(map(torch.equal, found, expected))
    for ours, right in zip(found, expected, strict=True):
        assert z_image_models.relative_error(ours, right) <= 1e-6


def test_weights_that_the_class_could_not_run_are_refused(cache: ModelCache, state: State) -> None:
    mixed = {
        name: TensorInfo.of(tensor if name == "cap_pad_token" else tensor.to(torch.bfloat16))
        for name, tensor in state.items()
    }
    with pytest.raises(Unsupported, match=r"cap_pad_token is torch\.float32 and most weights are torch\.bfloat16"):
        cache.match(mixed)


def test_float32_norms_in_a_bfloat16_model_run(cache: ModelCache, plug: Plugger) -> None:
    state = {
        name: tensor if "norm" in name and tensor.ndim == 1 else tensor.to(torch.bfloat16)
        for name, tensor in z_image_models.state_dict(0).items()
    }
    model = plug(cache, state).model
    assert model.dtype == torch.bfloat16
    given = z_image_models.inputs((20, 20), ((8, 8),) * 2)
    given["x"] = [each.to(torch.bfloat16) for each in given["x"]]
    exact = z_image_models.reference({name: tensor.float() for name, tensor in state.items()})
    with torch.no_grad():
        expected = exact(**{**given, "x": [each.float() for each in given["x"]]}, return_dict=False)[0]
    for ours, right in zip(run(model, given), expected, strict=True):
        assert z_image_models.relative_error(ours, right) < 0.03
