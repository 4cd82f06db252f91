"""Wan through a real daemon and two ranks: texts by UMT5, pictures that the workers encode, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import text_checkpoints
import torch
import wan_models
import wan_vaes
from safetensors.torch import save_file

from xditd.client import BadRequest

BAR = 1e-6
SIDES = {"frames": 9, "height": 32, "width": 48}
STEPS = {"steps": 3, "guidance_scale": 2.0}


class Sample:
    """What :func:`wan_models.image_pipeline_latents` samples."""

    options: ClassVar[dict[str, Any]] = {}
    scale = STEPS["guidance_scale"]
    steps = STEPS["steps"]
    sides = SIDES

    def __init__(self, config: Any, conditioning: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.conditioning = conditioning
        size = (3, 32 // config.pixels, 48 // config.pixels)
        self.noise = torch.randn(1, config.out_channels, *size, generator=torch.Generator().manual_seed(1))


def conditioning(config: Any, *pictures: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = 512 if config.image_channels else 20
    found = {
        name: torch.randn(1, tokens, 48, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    for name in pictures:
        found[name] = torch.randint(0, 257, (1, 3, 32, 48), generator=generator) / 128 - 1
    if config.image_channels:
        found["image_embeds"] = torch.randn(config.images, 257, config.image_channels, generator=generator)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("wan")
    found = SimpleNamespace()
    models = {
        "text": wan_models.TEXT,
        "image": wan_models.IMAGE,
        "clip_image": wan_models.CLIP_IMAGE,
        "ti2v": wan_models.TI2V,
        "vace": wan_models.TWO_CONTROLS,
    }
    for name, config in models.items():
        save_file(wan_models.state_dict(0, config), folder / f"{name}.safetensors")
    save_file(wan_vaes.state_dict(), folder / "vae.safetensors")
    save_file(wan_vaes.state_dict(config=wan_vaes.SMALL_2_2), folder / "vae_2_2.safetensors")
    text_checkpoints.write_umt5(folder / "umt5.safetensors", seed=7)
    for path in folder.iterdir():
        setattr(found, path.stem, path)
    return found


def plain_vae(config: Any) -> Any:
    of_vae = wan_vaes.SMALL_2_2 if config.has_time_per_token else wan_vaes.SMALL
    module = wan_vaes.reference(wan_vaes.state_dict(config=of_vae), of_vae)
    means, deviations = (each.flatten().tolist() for each in wan_vaes.statistics(of_vae))
    module.register_to_config(latents_mean=means, latents_std=deviations)
    return module


@pytest.mark.parametrize(
    ("name", "config", "pictures"),
    [
        ("image", wan_models.IMAGE, ("image", "last_image")),
        ("clip_image", wan_models.CLIP_IMAGE, ("image",)),
        ("ti2v", wan_models.TI2V, ("image",)),
    ],
    ids=["Wan 2.2, two images", "Wan 2.1", "TI2V"],
)
def test_a_picture_becomes_a_video(client, files, relative_error, name: str, config: Any, pictures: tuple[str, ...]):
    sides = SIDES | ({"height": 32, "width": 64} if config.has_time_per_token else {})
    sample = Sample(config, conditioning(config, *pictures))
    if config.has_time_per_token:
        sample.sides = sides
        sample.noise = torch.randn(1, 48, 3, 2, 4, generator=torch.Generator().manual_seed(1))
        sample.conditioning["image"] = torch.nn.functional.pad(sample.conditioning["image"], (0, 16))
    vae_file: Path = files.vae_2_2 if config.has_time_per_token else files.vae
    loan, vae = client.lend(getattr(files, name)), client.lend(vae_file)
    job = client.generate(loan, sample.conditioning, vae=vae, noise=sample.noise, **sides, **STEPS)
    result = job.result()
    module = wan_models.reference(wan_models.state_dict(0, config), config)
    expected = wan_models.image_pipeline_latents(module, None, plain_vae(config), sample)
    assert relative_error(result.latents, expected) <= BAR
    assert result.image.shape == (1, 3, 9, sides["height"], sides["width"])
    assert relative_error(result.image, client.decode(vae, result.latents).clamp(-1, 1)) <= 1e-5


def module_rows(config: Any, layer: str) -> int:
    return config.ffn if layer.endswith("ffn.0") else config.hidden


def controls() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        **conditioning(wan_models.TWO_CONTROLS),
        "video": torch.rand(1, 3, 9, 32, 48, generator=generator) * 2 - 1,
        "mask": torch.rand(1, 1, 9, 32, 48, generator=generator),
        "reference_images": [torch.rand(3, 32, 48, generator=generator) * 2 - 1 for _ in range(2)],
    }


def test_a_video_a_mask_and_references_control_a_video(client, files, relative_error):
    config = wan_models.TWO_CONTROLS
    sample = Sample(config, controls())
    sample.noise = torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    loan, vae = client.lend(files.vace), client.lend(files.vae)
    assert (loan.family, loan.facts.class_name) == ("wan_vace", "WanVACETransformer3DModel")
    result = client.generate(loan, sample.conditioning, vae=vae, noise=sample.noise, **SIDES, **STEPS).result()
    module = wan_models.reference(wan_models.state_dict(0, config), config)
    expected = wan_models.control_pipeline_latents(module, plain_vae(config), sample)
    assert relative_error(result.latents, expected) <= BAR
    assert result.image.shape == (1, 3, 9, 32, 48)
    given = wan_models.inputs(2, 9, (3, 4, 6), config)
    (found,) = client.call(loan, given)
    with torch.no_grad():
        assert relative_error(found, module(**given, return_dict=False)[0]) <= BAR
    several = wan_models.controlled_inputs(2, 9, (3, 4, 6), 2, config)
    (found,) = client.call(loan, several)
    right = wan_models.controlled_reference(wan_models.state_dict(0, config), config, several)
    assert relative_error(found, right) <= BAR
    # A LoRA of a text model fits, and one of control blocks.
    factors = {}
    for layer in ("blocks.1.self_attn.q", "vace_blocks.1.ffn.0"):
        rows = module_rows(config, layer)
        factors[f"{layer}.lora_A.weight"] = torch.randn(4, 256, generator=torch.Generator().manual_seed(4)) / 16
        factors[f"{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=torch.Generator().manual_seed(5)) / 2
    state = wan_models.state_dict(0, config)
    for layer in ("blocks.1.self_attn.q", "vace_blocks.1.ffn.0"):
        product = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + 0.8 * product
    (found,) = client.call(loan.with_loras([(client.lend_lora(factors), 0.8)]), given)
    with torch.no_grad():
        assert relative_error(found, wan_models.reference(state, config)(**given, return_dict=False)[0]) <= BAR
    with pytest.raises(BadRequest, match=r"noise: shape is \[1, 16, 4, 4, 6\], use \[1, 16, 5, 4, 6\]"):
        client.generate(loan, sample.conditioning, vae=vae, noise=sample.noise[:, :, 1:], **SIDES, **STEPS).result()
    short = {"mask": torch.zeros(1, 1, 5, 32, 48)}
    with pytest.raises(BadRequest, match="mask: frames 5, but video has frames 9"):
        client.generate(loan, sample.conditioning | short, vae=vae, seed=1, **SIDES, **STEPS)
    small = {"reference_images": [torch.zeros(3, 16, 16)]}
    with pytest.raises(BadRequest, match=r"reference_images\[0\]: 16 x 16 pixels, but the video has 32 x 48"):
        client.generate(loan, sample.conditioning | small, vae=vae, seed=1, **SIDES, **STEPS).result()


def test_the_seed_draws_the_same_video_twice(client, files):
    config = wan_models.IMAGE
    loan, vae = client.lend(files.image), client.lend(files.vae)
    given = conditioning(config, "image")
    first, second = (client.generate(loan, given, vae=vae, seed=5, **SIDES, **STEPS).result() for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.image, second.image)
    halves = {name: tensor.bfloat16() for name, tensor in given.items()}
    assert client.generate(loan, halves, vae=vae, seed=5, **SIDES, **STEPS).result().latents.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("text", {"image": torch.zeros(1, 3, 32, 48)}, "conditioning: image is not known here; this transformer takes"),
        ("image", {"image": None}, "conditioning: lacks image; this transformer takes"),
        ("image", {"image": torch.zeros(1, 3, 48, 48)}, "image: 48 x 48 pixels, but the video has 32 x 48; resize it"),
        ("image", {"last_image": torch.zeros(1, 3, 48, 48)}, "last_image: height 48, but image has height 32"),
        ("clip_image", {"image_embeds": None}, "conditioning: lacks image_embeds"),
        (
            "clip_image",
            {"prompt_embeds": torch.zeros(1, 20, 48)},
            r"prompt_embeds: shape is \[1, 20, 48\], use \[1, 512, 48\]",
        ),
    ],
    ids=str,
)
def test_what_a_variant_does_not_take_is_refused_by_name(client, files, name: str, changes: Any, says: str):
    config = {"text": wan_models.TEXT, "image": wan_models.IMAGE, "clip_image": wan_models.CLIP_IMAGE}[name]
    loan, vae = client.lend(getattr(files, name)), client.lend(files.vae)
    given = conditioning(config, *(["image"] if config.has_image_latents else [])) | changes
    with pytest.raises(BadRequest, match=says):
        client.generate(loan, given, vae=vae, seed=5, **SIDES, **STEPS).result()


def test_a_picture_without_a_vae_is_refused(client, files):
    given = conditioning(wan_models.IMAGE, "image")
    with pytest.raises(BadRequest, match="image: the workers encode it, but the job has no vae; give vae="):
        client.generate(client.lend(files.image), given, seed=5, **SIDES, **STEPS).result()


@pytest.mark.parametrize("source", ["folder", "file", "file with a projection"])
def test_the_states_of_clips_vision_model_are_those_of_the_class(client, tmp_path, relative_error, source: str):
    """A file as ComfyUI has it, ``clip_vision_h.safetensors``, and a folder of transformers."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=2, hidden_act="gelu", projection_dim=24)
    module = CLIPVisionModelWithProjection(config).eval()
    state = module.state_dict()
    assert {name.split(".")[0] for name in state} == {"vision_model", "visual_projection"}
    if source == "folder":
        module.vision_model.save_pretrained(tmp_path / "image_encoder")
        loan = client.lend(tmp_path / "image_encoder")
    else:
        kept = {name: each for name, each in state.items() if "projection." in name or name.startswith("vision_model.")}
        if source == "file":
            del kept["visual_projection.weight"]
        kept["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
        save_file(kept, tmp_path / "clip_vision_h.safetensors")
        loan = client.lend(tmp_path / "clip_vision_h.safetensors")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = client.call(loan, {"pixel_values": pixels, "output_hidden_states": True})
    with torch.no_grad():
        expected = module(pixel_values=pixels, output_hidden_states=True)
    assert expected.hidden_states[-2].shape == (2, 257, 160)
    assert relative_error(found["hidden_states"][-2], expected.hidden_states[-2]) <= BAR
    if source == "file with a projection":
        assert relative_error(found["image_embeds"], expected.image_embeds) <= BAR
