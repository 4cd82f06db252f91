"""Qwen-Image through a real daemon: masks, references of other sizes, the marker of Edit-2511, and its VAE."""

from __future__ import annotations

from typing import Any

import pytest
import qwen2_5_vl_models
import qwen_image_models
import torch
from safetensors.torch import save_file

from xditd.client import BadCheckpoint, BadRequest
from xditd.client.families.qwen_image import edit_templated
from xditd.gpu_workers.families.wan_vae.checkpoint import WanVae
from xditd.gpu_workers.families.wan_vae.config import WanVaeConfig

BAR = 1e-6
SIZE = {"height": 48, "width": 80, "steps": 3}
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return qwen_image_models.state_dict(0, qwen_image_models.EDIT_2511)


@pytest.fixture
def loan(client, state, tmp_path):
    save_file({PREFIX + name: each for name, each in state.items()}, tmp_path / "edit.safetensors")
    return client.lend(tmp_path / "edit.safetensors")


@pytest.fixture
def small_vae(client, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for entry in WanVae().entries(WanVaeConfig(width=8), ("decoder.middle.0.residual.0.gamma",)):
        values = torch.randn(entry.shape, generator=generator)
        tensors[entry.source] = values / max(1.0, torch.Size(entry.shape[1:]).numel() ** 0.5)
    save_file(tensors, tmp_path / "vae.safetensors")
    return client.lend(tmp_path / "vae.safetensors")


def test_facts_say_what_it_takes(loan):
    facts = loan.facts
    assert (facts.family, facts.class_name) == ("qwen_image", "QwenImageTransformer2DModel")
    assert [each.name for each in facts.transformer.conditioning if each.is_shared] == ["reference_latents"]
    assert facts.transformer.variants == ("class", "zero_cond_t", "comfyui")
    assert facts.transformer.float32_latents == ("comfyui",)


@pytest.mark.parametrize("zero_cond_t", [True, False])
def test_a_configuration_says_that_references_are_at_timestep_zero(client, tmp_path, zero_cond_t):
    """That of a folder, and that of a live module; a file does not."""
    given = qwen_image_models.inputs(1, 9, (4, 6), ((3, 5),))
    plain = qwen_image_models.state_dict(0)
    module = qwen_image_models.reference(plain, zero_cond_t=zero_cond_t)
    module.save_pretrained(tmp_path / "transformer")
    with torch.no_grad():
        (right,) = module(**given, return_dict=False)
    for source in (module, tmp_path / "transformer"):
        with client.lend(source) as lent:
            assert lent.family == "qwen_image"
            (found,) = client.call(lent, given)
            assert qwen_image_models.relative_error(found, right) <= BAR
    with client.lend(plain) as lent:
        (found,) = client.call(lent, given)
        assert (qwen_image_models.relative_error(found, right) <= BAR) is not zero_cond_t


def test_a_call_returns_what_the_class_returns(client, loan, state, relative_error):
    given = qwen_image_models.inputs(2, 9, (4, 6), ((3, 5),), (9, 4))
    (found,) = client.call(loan, given)
    with torch.no_grad():
        (right,) = qwen_image_models.reference(state, qwen_image_models.EDIT_2511)(**given, return_dict=False)
    assert relative_error(found, right) <= BAR
    with pytest.raises(BadRequest, match=r"img_shapes: .* is 24 tokens, hidden_states have 39"):
        client.call(loan, {**given, "img_shapes": [[(1, 4, 6)]] * 2})
    with pytest.raises(BadRequest, match="guidance cannot be given"):
        client.call(loan, {**given, "guidance": torch.ones(2)})


def test_an_edit_from_pictures_to_a_picture(client, loan, small_vae, state, relative_error):
    pictures = [
        torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1 for size in ((32, 64), (48, 16))
    ]
    references = [client.encode(small_vae, each)[0] for each in pictures]
    assert [tuple(each.shape) for each in references] == [(16, 4, 8), (16, 6, 2)]
    generator = torch.Generator().manual_seed(2)
    conditioning: dict[str, Any] = {
        "prompt_embeds": torch.randn(2, 9, 96, generator=generator),
        "prompt_embeds_mask": qwen_image_models.mask((9, 5), 9).float(),
        "negative_prompt_embeds": torch.randn(2, 6, 96, generator=generator),
        "reference_latents": references,
    }
    noise = torch.randn(2, 16, 6, 10, generator=generator)
    job = client.generate(loan, conditioning, vae=small_vae, noise=noise, guidance_scale=2.0, **SIZE)
    result = job.result()
    module = qwen_image_models.reference(state, qwen_image_models.EDIT_2511)
    right = edited(module, conditioning, noise)
    assert relative_error(result.latents, right) <= 2 * BAR
    assert result.image.shape == (2, 3, 48, 80)
    assert relative_error(result.image, client.decode(small_vae, result.latents)) <= BAR


@torch.no_grad()
def edited(module: Any, conditioning: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
    """Sample as the pipelines do, which take pictures in place of latents."""
    import numpy as np
    from diffusers import QwenImagePipeline
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    scheduler = qwen_image_models.scheduler()
    latents = QwenImagePipeline._pack_latents(noise, *noise.shape)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / 3, 3), mu=calculate_shift(latents.shape[1], 256, 8192, 0.5, 0.9)
    )
    images = [noise[0], *conditioning["reference_latents"]]
    tokens = [QwenImagePipeline._pack_latents(each[None], 1, *each.shape).repeat(2, 1, 1) for each in images[1:]]
    sizes = [[(1, each.shape[1] // 2, each.shape[2] // 2) for each in images]] * 2
    for timestep in scheduler.timesteps:
        positive, negative = (
            module(
                hidden_states=torch.cat([latents, *tokens], dim=1),
                timestep=timestep.expand(2) / 1000,
                encoder_hidden_states=conditioning[name],
                encoder_hidden_states_mask=conditioning.get(f"{name}_mask"),
                img_shapes=sizes,
                return_dict=False,
            )[0][:, : latents.shape[1]]
            for name in ("prompt_embeds", "negative_prompt_embeds")
        )
        combined = negative + 2.0 * (positive - negative)
        combined = combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        latents = scheduler.step(combined, timestep, latents, return_dict=False)[0]
    return QwenImagePipeline._unpack_latents(latents, 48, 80, 8).squeeze(2)


def test_bad_input_is_named(client, loan, state):
    conditioning = {"prompt_embeds": torch.zeros(1, 9, 96)}
    for more, says in (
        ({}, "negative_prompt_embeds is missing: guidance_scale 4 needs one"),
        ({"reference_latents": torch.zeros(16, 4, 4)}, "reference_latents: a list of tensors"),
        ({"reference_latents": [torch.zeros(16, 3, 4)]}, r"reference_latents\[0\]: shape is \[16, 3, 4\]"),
        ({"prompt_embeds_mask": torch.ones(1, 8)}, "prompt_embeds_mask: tokens 8, but prompt_embeds has tokens 9"),
    ):
        scale = 4.0 if not more else 1.0
        with pytest.raises(BadRequest, match=says):
            client.generate(loan, conditioning | more, guidance_scale=scale, seed=1, **SIZE).result()
    with pytest.raises(BadCheckpoint, match=r"1 missing: transformer_blocks\.1\.attn\.to_add_out\.bias"):
        client.lend({name: each for name, each in state.items() if name != "transformer_blocks.1.attn.to_add_out.bias"})


def test_pictures_in_prompts(client, tmp_path, relative_error):
    """As in docs/qwen_image.md, with an encoder from a file, on all workers of the group."""
    save_file(qwen2_5_vl_models.state_dict(), tmp_path / "qwen_2.5_vl.safetensors")
    loan = client.lend(tmp_path / "qwen_2.5_vl.safetensors")
    assert [each.name for each in loan.facts.text_encoder.images] == [
        "pixel_values",
        "image_grid_thw",
        "mm_token_type_ids",
    ]
    processor = qwen2_5_vl_models.Processor()
    pictures = [qwen2_5_vl_models.picture(96, 64), qwen2_5_vl_models.picture(56, 112, seed=1)]
    inputs = processor([edit_templated("give the cat a hat", 2)], pictures)
    for names in (("pixel_values", "image_grid_thw"), ("pixel_values", "image_grid_thw", "mm_token_type_ids")):
        images = {name: inputs[name] for name in names}
        found = client.encode_text(loan, inputs["input_ids"], mask=inputs["attention_mask"], images=images)
        with torch.no_grad():
            right = qwen2_5_vl_models.reference()(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **images
            )
        assert relative_error(found.hidden_states, right.last_hidden_state) <= 1e-5
    short = inputs["input_ids"][:, :-40]
    with pytest.raises(BadRequest, match=r"images: they are \d+ tokens, but token_ids have"):
        client.encode_text(loan, short[:, :70], images={**images, "mm_token_type_ids": None})
    with pytest.raises(BadRequest, match="images: lacks image_grid_thw"):
        client.encode_text(loan, short, images={"pixel_values": inputs["pixel_values"]})
