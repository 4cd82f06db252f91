"""Z-Image through a real daemon: lists of tensors both ways, guidance, options, and a VAE of another family."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import z_image_models
from safetensors.torch import save_file

from xditd.client import BadRequest, Unsupported, WorkersLost

BAR = 1e-6
SIZE = {"height": 128, "width": 96, "steps": 3}
GUIDANCE = 1.0
"""More of it multiplies what roundings differ by."""


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return z_image_models.state_dict(0, names=z_image_models.COMFYUI, prefix="model.diffusion_model.")


@pytest.fixture(scope="module")
def reference(state) -> Any:
    return z_image_models.reference(state)


@pytest.fixture
def loan(client, state, tmp_path):
    save_file(state, tmp_path / "z_image.safetensors")
    return client.lend(tmp_path / "z_image.safetensors")


def texts(*lengths: int) -> list[torch.Tensor]:
    return z_image_models.inputs(lengths, ((8, 8),))["cap_feats"]


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, 16, SIZE["height"] // 8, SIZE["width"] // 8, generator=torch.Generator().manual_seed(3))


def test_facts_say_what_it_takes(loan):
    facts = loan.facts
    assert (facts.family, facts.class_name) == ("z_image", "ZImageTransformer2DModel")
    assert [each.name for each in facts.transformer.arguments] == ["x", "t", "cap_feats"]
    assert facts.transformer.guidance == "classifier_free"
    assert facts.transformer.options == ("shift", "cfg_normalization", "cfg_truncation")
    assert facts.transformer.float32_latents == facts.transformer.variants == ("class", "comfyui")


def test_a_call_returns_what_the_class_returns(client, loan, reference, relative_error):
    given = z_image_models.inputs((7, 40), ((8, 12), (6, 4)))
    kept = client.keep(given["cap_feats"][0])
    (found,) = client.call(loan, {**given, "cap_feats": [kept, given["cap_feats"][1]]})
    (again,) = client.call(loan, {**given, "cap_feats": [kept, given["cap_feats"][1]]})
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    assert isinstance(found, list)
    assert [tuple(row.shape) for row in found] == [(16, 1, 8, 12), (16, 1, 6, 4)]
    for ours, right in zip(found, expected, strict=True):
        assert relative_error(ours, right) <= BAR
    assert all(torch.equal(mine, its) for mine, its in zip(found, again, strict=True))


def test_generating_agrees_with_the_pipeline(client, loan, vae, reference, relative_error):
    prompts, negatives = texts(33, 7), texts(12, 12)
    conditioning = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives}
    job = client.generate(loan, conditioning, vae=vae, noise=noise(2), guidance_scale=GUIDANCE, **SIZE)
    result = job.result()
    expected = z_image_models.pipeline_latents(
        reference, shift=6.0, noise=noise(2), steps=SIZE["steps"], conditioning=conditioning, guidance_scale=GUIDANCE
    )
    assert relative_error(result.latents, expected) <= BAR
    assert result.image.shape == (2, 3, SIZE["height"], SIZE["width"])
    assert relative_error(result.image, client.decode(vae, result.latents)) <= BAR


def test_defaults_are_turbos_and_a_seed_stands_for_the_pipelines_noise(client, loan, reference, relative_error):
    conditioning = {"prompt_embeds": texts(20)}
    drawn = torch.randn(1, 16, 16, 12, generator=torch.Generator("cpu").manual_seed(7))
    result = client.generate(loan, conditioning, height=128, width=96, seed=7).result()
    expected = z_image_models.pipeline_latents(
        reference, shift=3.0, noise=drawn, steps=8, conditioning=conditioning, guidance_scale=0.0
    )
    assert relative_error(result.latents, expected) <= BAR


def test_latents_are_float32_whatever_the_dtype_of_weights_and_texts(client, state, tmp_path, relative_error):
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "half.safetensors")
    loan = client.lend(tmp_path / "half.safetensors")
    conditioning = {"prompt_embeds": [text.bfloat16() for text in texts(20)]}
    expected = z_image_models.pipeline_latents(
        z_image_models.reference(state).bfloat16(),
        shift=3.0,
        noise=noise(1),
        steps=SIZE["steps"],
        conditioning=conditioning,
        guidance_scale=0.0,
    )
    assert expected.dtype == torch.float32
    for given in (noise(1), noise(1).bfloat16()):
        found = client.generate(loan, conditioning, noise=given, **SIZE).result().latents
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
        assert relative_error(found, expected) <= 1e-2


def test_options_reach_it_and_others_are_refused(client, loan, relative_error):
    conditioning = {"prompt_embeds": texts(20)}
    given = {"noise": noise(1), **SIZE}
    plain, shifted = (
        client.generate(loan, conditioning, **given, options=options).result().latents
        for options in ({}, {"shift": 1.5})
    )
    assert relative_error(shifted, plain) > 1e-3
    with pytest.raises(BadRequest, match=r"options: eta=1\.0 is not known; give one of shift, cfg_normalization"):
        client.generate(loan, conditioning, **given, options={"eta": 1.0}).result()
    with pytest.raises(BadRequest, match="negative_prompt_embeds is missing"):
        client.generate(loan, conditioning, **given, guidance_scale=2.0).result()
    with pytest.raises(BadRequest, match=r"step_cache: 0\.1 is given, but this transformer has no step cache"):
        client.generate(loan, conditioning, **given, step_cache=0.1).result()
    endless = {"prompt_embeds": [torch.full((4, 64), torch.inf)]}
    with pytest.raises(BadRequest, match=r"prompt_embeds\[0\]: some values are not finite"):
        client.generate(loan, endless, **given).result()


def test_previews_are_latents_of_each_step(client, loan, relative_error):
    with client.generate(loan, {"prompt_embeds": texts(20)}, noise=noise(1), previews=True, **SIZE) as job:
        shown = [job.denoised().clone() for _ in job]
        result = job.result()
    assert len(shown) == SIZE["steps"]
    assert relative_error(shown[-1], result.latents) <= BAR


def test_a_variant_is_refused_by_name(client, state, tmp_path):
    more = {"model.diffusion_model.siglip_embedder.1.weight": torch.zeros(256, 8)}
    save_file({**state, **more}, tmp_path / "omni.safetensors")
    with pytest.raises(Unsupported, match="Z-Image Omni and Edit"):
        client.lend(tmp_path / "omni.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_no_layer_takes_is_refused_and_the_workers_stay(client, loan, dtype):
    given = z_image_models.inputs((7,), ((8, 8),))
    workers = client.status().workers
    with pytest.raises(BadRequest, match=r"cap_feats\[0\]: dtype is float\w+, use float32"):
        client.call(loan, {**given, "cap_feats": [each.to(dtype) for each in given["cap_feats"]]})
    with pytest.raises(BadRequest, match="t: dtype is float8_e5m2, use float32"):
        client.call(loan, {**given, "t": given["t"].to(torch.float8_e5m2)})
    client.call(loan, given)
    assert [each.pid for each in client.status().workers] == [each.pid for each in workers]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["last rank", "leader"])
def test_kept_tensors_are_sent_again_to_workers_that_were_rebuilt(victim, client, loan, processes, wait_until):
    given = z_image_models.inputs((7,), ((8, 8),))
    arguments = {**given, "cap_feats": [client.keep(given["cap_feats"][0])]}
    ((before,),) = client.call(loan, arguments)
    status = client.status()
    ranks = [worker.pid for worker in status.workers]
    os.kill(processes.parent_of(ranks[0]) if victim == "leader" else ranks[-1], signal.SIGKILL)
    # Ranks whose leader was killed live on for a moment, and may serve the call.
    wait_until(lambda: not any(processes.is_running(pid) for pid in ranks), "the ranks to end")
    try:
        ((after,),) = client.call(loan, arguments)
    except WorkersLost:  # the call reached the workers before the daemon noticed
        ((after,),) = client.call(loan, arguments)
    assert torch.equal(before, after)
    assert client.status().counters.group_starts == status.counters.group_starts + 1
