"""FLUX.2 through a real daemon with two workers: references, klein's cache, its VAE, and text encoders."""

from __future__ import annotations

from typing import Any

import flux2_models
import flux2_vaes
import language_models
import pytest
import torch
from safetensors.torch import save_file

from xditd.client import BadRequest, Unsupported

BAR = 1e-6
SIZE = {"height": 128, "width": 96, "steps": 3}


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def lend(client, tmp_path):
    def run(state: dict[str, torch.Tensor], name: str = "model") -> Any:
        save_file(state, tmp_path / f"{name}.safetensors")
        return client.lend(tmp_path / f"{name}.safetensors")

    return run


def test_generating_with_references_and_a_vae_agrees_with_the_pipeline(client, lend, relative_error):
    state = flux2_models.state_dict(0, prefix="model.diffusion_model.")
    loan, vae = lend(state), lend(flux2_vaes.state_dict(0), "vae")
    assert (loan.facts.family, vae.facts.family) == ("flux2", "flux2_vae")
    prompt, noise = drawn(2, 21, 96), drawn(2, 128, 8, 6, seed=2)
    image = drawn(1, 3, 64, 48, seed=3).clamp(-1, 1)
    reference = client.encode(vae, image)
    assert relative_error(reference, flux2_vaes.reference_encode(flux2_vaes.reference(), image)) <= 1e-5
    references = [reference[0], drawn(128, 3, 5, seed=4)]
    conditioning = {"prompt_embeds": prompt, "reference_latents": references}
    result = client.generate(loan, conditioning, vae=vae, noise=noise, guidance_scale=2.5, **SIZE).result()
    module = flux2_models.reference({name.removeprefix("model.diffusion_model."): t for name, t in state.items()})
    expected = flux2_models.pipeline_latents(
        module, noise=noise, steps=3, conditioning={"prompt_embeds": prompt}, references=references, guidance_scale=2.5
    )
    assert relative_error(result.latents, expected) <= BAR
    decoded = flux2_vaes.reference_decode(flux2_vaes.reference(), result.latents)
    assert relative_error(result.image, decoded.clamp(-1, 1)) <= 1e-5
    with pytest.raises(BadRequest, match=r"reference_latents\[0\]: shape \(32, 4, 4\) instead of \(128"):
        client.generate(loan, {**conditioning, "reference_latents": [drawn(32, 4, 4)]}, noise=noise, **SIZE)


def test_a_call_returns_what_the_class_returns(client, lend, relative_error):
    loan = lend(flux2_models.state_dict(0))
    given = flux2_models.inputs(2, 7, (5, 9), references=((3, 4),))
    (found,) = client.call(loan, given)
    with torch.no_grad():
        expected = flux2_models.reference(flux2_models.state_dict(0))(**given, return_dict=False)[0]
    assert relative_error(found, expected) <= BAR


def test_kleins_cache_and_guidance(client, lend, relative_error):
    state = flux2_models.state_dict(0, flux2_models.KLEIN)
    loan, module = lend(state), flux2_models.reference(state, flux2_models.KLEIN)
    noise, references = drawn(1, 128, 8, 6), [drawn(128, 3, 5, seed=4)]
    conditioning = {"prompt_embeds": drawn(1, 9, 96)}
    asked = {"noise": noise, **SIZE}
    kept = client.generate(
        loan, {**conditioning, "reference_latents": references}, options={"kv_cache": True}, **asked
    ).result()
    expected = flux2_models.pipeline_latents(
        module, noise=noise, steps=3, conditioning=conditioning, references=references, has_cache=True
    )
    assert relative_error(kept.latents, expected) <= BAR
    both = conditioning | {"negative_prompt_embeds": drawn(1, 5, 96, seed=8)}
    guided = client.generate(loan, both, guidance_scale=2.0, **asked).result()
    expected = flux2_models.pipeline_latents(module, noise=noise, steps=3, conditioning=both, guidance_scale=2.0)
    assert relative_error(guided.latents, expected) <= BAR
    with pytest.raises(BadRequest, match="negative_prompt_embeds is missing"):
        client.generate(loan, conditioning, guidance_scale=2.0, **asked).result()


@pytest.mark.parametrize("family", list(language_models.FAMILIES))
def test_text_is_encoded_to_the_states_of_layers(family, client, lend, relative_error):
    loan = lend(language_models.state_dict(family, 0))
    assert (loan.facts.family, loan.facts.text_encoder.layers) == (family, 4)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = client.encode_text(loan, ids, mask=mask, layers=(1, 2, 4)).hidden_states
    model, last = language_models.reference(family, 0), []
    model.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0]))  # that of the last layer
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    assert relative_error(found, torch.cat([states[1], states[2], last[0]], dim=-1)) <= 1e-5
    assert relative_error(client.encode_text(loan, ids, mask=mask.bool()).hidden_states, states[-1]) <= 1e-5
    for more, says in (
        ({"layers": (5,)}, f"layers: 5 is not one of {family}, which has 4"),
        ({"layers": "9"}, "layers: '9' is not a sequence"),
        ({"layers": (-1,)}, r"layers\[0\]: -1 is not a whole number"),
        ({"mask": mask[:1]}, r"mask: shape \(1, 9\), but token_ids have \(2, 9\)"),
        ({"mask": mask + 1}, "mask: use 1 for tokens and 0 for padding"),
        ({"mask": torch.zeros_like(ids)}, r"mask\[0\]: no token is left"),
        ({"pooled": True}, f"pooled: {family} has no pooled state"),
    ):
        with pytest.raises(BadRequest, match=says):
            client.encode_text(loan, ids, **more)


def test_variants_are_refused_by_name(client, lend):
    state = flux2_models.state_dict(0) | {
        "img_in.weight": torch.zeros(256, 192),
        "final_layer.linear.weight": torch.zeros(192, 256),
    }
    with pytest.raises(Unsupported, match="img_in takes 192 channels, not 128"):
        lend(state)
