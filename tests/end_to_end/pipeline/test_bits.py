"""``Pipeline`` gives the bits of diffusers' pipeline with the same folder, on one worker in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline_folders as folders
import pytest
import torch
import wan_models
from pipeline_folders import HEIGHT, WIDTH
from pipeline_latents import SEED, SIZE
from pipeline_latents import latents as theirs
from pipeline_parts import image, mask

from xditd.client import BadRequest, Pipeline, Unsupported

pytestmark = pytest.mark.usefixtures("convolutions_of_workers")

Open = Callable[..., Pipeline]


def ours(pipe: Pipeline, conditioning: dict[str, Any], **given: Any) -> torch.Tensor:
    return pipe(conditioning=conditioning, seed=SEED, **SIZE, **given).generation.latents


def repeated(texts: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {name: each.repeat_interleave(count, dim=0) for name, each in texts.items()}


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 4])
@pytest.mark.parametrize("family", ["flux1", "flux2", "qwen_image", "z_image"])
def test_pictures(opened: Open, family: str, count: int) -> None:
    make, texts = folders.FAMILIES[family]
    pipeline, given = make(), texts(1)
    more: dict[str, Any] = {"guidance_scale": 0.0} if family == "z_image" else {}
    if family == "flux1":  # which does not repeat embeddings that it is given
        right = theirs(pipeline, family, num_inference_steps=3, **repeated(given, count))
    else:
        right = theirs(pipeline, family, num_inference_steps=3, num_images_per_prompt=count, **given, **more)
    pipe = opened(pipeline)
    plain = {"guidance": 1.0} if family == "qwen_image" else {}
    assert torch.equal(ours(pipe, given, steps=3, num_images=count, **plain), right)


@pytest.mark.parametrize("family", ["flux1", "flux2", "qwen_image", "z_image"])
def test_sigmas_are_shifted_by_the_folders_scheduler(opened: Open, family: str) -> None:
    make, texts = folders.FAMILIES[family]
    pipeline, given, sigmas = make(), texts(1), [1.0, 0.6, 0.15]
    more: dict[str, Any] = {"guidance_scale": 0.0} if family == "z_image" else {}
    right = theirs(pipeline, family, num_inference_steps=3, sigmas=sigmas, **given, **more)
    pipe = opened(pipeline)
    plain = {"guidance": 1.0} if family == "qwen_image" else {}
    assert torch.equal(ours(pipe, given, steps=3, sigmas=sigmas, **plain), right)
    if family == "flux2":
        with pytest.raises(BadRequest, match="sigmas without steps: the scheduler shifts them by the number of steps"):
            ours(pipe, given, sigmas=sigmas)
    else:
        assert torch.equal(ours(pipe, given, sigmas=sigmas, **plain), right)


@pytest.mark.parametrize("family", ["qwen_image", "z_image", "flux2"])
def test_negative_prompts(opened: Open, family: str) -> None:
    make, texts = folders.FAMILIES[family]
    pipeline = folders.flux2("Flux2KleinPipeline", is_distilled=False) if family == "flux2" else make()
    name = "true_cfg_scale" if family == "qwen_image" else "guidance_scale"
    given = texts(1, negative=True)
    right = theirs(pipeline, family, num_inference_steps=3, **{name: 2.5}, **given)
    assert torch.equal(ours(opened(pipeline), given, steps=3, guidance=2.5), right)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 2])
def test_videos(opened: Open, count: int) -> None:
    pipeline, given = folders.wan(), folders.wan_texts()
    of_each = repeated(given, count)  # which the pipeline does not do with embeddings that it is given
    right = theirs(pipeline, "wan", num_inference_steps=3, num_frames=5, guidance_scale=3.0, **of_each)
    pipe = opened(pipeline)
    assert torch.equal(ours(pipe, given, steps=3, frames=5, num_images=count, guidance=3.0), right)


def test_a_pair_of_transformers_with_the_folders_boundary(opened: Open) -> None:
    second = wan_models.reference(wan_models.state_dict(1))
    pipeline = folders.wan(transformer_2=second, boundary_ratio=0.8)
    given = folders.wan_texts()
    right = theirs(pipeline, "wan", num_inference_steps=3, num_frames=5, guidance_scale=3.0, **given)
    assert torch.equal(ours(opened(pipeline), given, steps=3, frames=5, guidance=3.0), right)


@pytest.mark.parametrize("config", ["image", "TI2V"])
def test_videos_from_a_picture(opened: Open, config: str) -> None:
    settings: dict[str, Any] = {"expand_timesteps": True} if config == "TI2V" else {}
    pipeline = folders.wan(
        "WanImageToVideoPipeline", wan_models.CONFIGS[config], image_processor=None, image_encoder=None, **settings
    )
    given, picture = folders.wan_texts(), image(120, 80)
    right = theirs(pipeline, "wan", image=picture, num_inference_steps=3, num_frames=5, guidance_scale=3.0, **given)
    found = ours(opened(pipeline), given, image=picture, steps=3, frames=5, guidance=3.0)
    assert torch.equal(found, right)


def test_videos_from_a_picture_that_clip_sees(opened: Open, tmp_path: Path) -> None:
    """Not the bits: resizing in CLIP's processor rounds otherwise."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=14, **sizes)).eval()
    pipeline = folders.wan(
        "WanImageToVideoPipeline", wan_models.CLIP_IMAGE, image_processor=CLIPImageProcessor(), image_encoder=clip
    )
    given, picture = folders.wan_texts(tokens=512), image(120, 80)
    right = theirs(pipeline, "wan", image=picture, num_inference_steps=3, num_frames=5, guidance_scale=3.0, **given)
    pipe = opened(pipeline)
    found = ours(pipe, given, image=picture, steps=3, frames=5, guidance=3.0)
    assert wan_models.relative_error(found, right) <= 1e-4
    index = tmp_path / "model0" / "image_processor" / "preprocessor_config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(Unsupported, match=r"image_mean=\[0.5, 0.5, 0.5\]"):
        Pipeline.open(tmp_path / "model0", client=pipe.client)


STARTS = {
    "flux1": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "qwen_image": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "z_image": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
}


@pytest.mark.parametrize(
    ("strength", "count"),
    [(0.7, 2), (1.0, 1), *(pytest.param(*each, marks=pytest.mark.long) for each in ((0.7, 1), (1.0, 2)))],
)
@pytest.mark.parametrize("family", STARTS)
@pytest.mark.parametrize("has_mask", [False, True])
def test_image_to_image_and_inpaint(opened: Open, family: str, has_mask: bool, strength: float, count: int) -> None:
    make, texts = folders.FAMILIES[family]
    pipeline, given = make(STARTS[family][has_mask]), texts(1)
    pictures = {"image": image(120, 80), "mask_image": mask(120, 80)} if has_mask else {"image": image(120, 80)}
    if family == "z_image":  # which does not resize pictures
        pictures = {name: each.resize((WIDTH, HEIGHT)) for name, each in pictures.items()}
    more: dict[str, Any] = {"guidance_scale": 0.0} if family == "z_image" else {}
    texts_of_theirs = repeated(given, count) if family == "flux1" else given
    if family != "flux1":
        more["num_images_per_prompt"] = count
    right = theirs(pipeline, family, strength=strength, num_inference_steps=4, **pictures, **texts_of_theirs, **more)
    mine = {"image": pictures["image"]} | ({"mask": pictures["mask_image"]} if has_mask else {})
    plain = {"guidance": 1.0} if family == "qwen_image" else {}
    folder = make() if family == "flux1" else pipeline  # a released folder: the call decides of which pipeline it is
    found = ours(opened(folder), given, steps=4, strength=strength, num_images=count, **mine, **plain)
    assert torch.equal(found, right)


@pytest.mark.parametrize("family", ["z_image", "wan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pictures_of_a_vae_in_half_precision_have_the_same_levels(
    opened: Open, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Diffusers moves pictures to [0, 1] in the VAE's dtype, which rounds many of them to another of 255 levels."""
    from PIL import Image

    make, texts = folders.FAMILIES[family]
    pipeline, given, of_video = make(), texts(1), family == "wan"
    pipeline.vae.to(dtype)
    more: dict[str, Any] = {"frames": 5, "guidance": 1.0} if of_video else {}
    if of_video:
        given.pop("negative_prompt_embeds")
    pipe = opened(pipeline)
    found = pipe(conditioning=given, seed=SEED, steps=1, **SIZE, **more)
    assert found.generation.image is not None
    assert found.generation.image.dtype == torch.float32
    kind = pipeline.video_processor if of_video else pipeline.image_processor
    decoded = found.generation.image.to(dtype)
    right = kind.postprocess_video(decoded, output_type="pil")[0] if of_video else kind.postprocess(decoded)
    mine = found.videos[0] if of_video else found.images
    assert [each.tobytes() for each in mine] == [each.tobytes() for each in right]
    numbers = found.to_numpy()
    assert [each.tobytes() for each in (numbers[0] if of_video else numbers)] == [each.tobytes() for each in right]
    paths = found.save(tmp_path / "frames" if of_video else tmp_path / "one.png")
    files = sorted(paths[0].iterdir()) if of_video else paths
    assert [Image.open(path).tobytes() for path in files] == [each.tobytes() for each in right]


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_starts_of_z_image_in_half_precision(opened: Open, dtype: torch.dtype, has_mask: bool) -> None:
    """Noise and the image's latents are of that dtype, as in its pipelines, and steps give float32."""
    pipeline = folders.z_image(STARTS["z_image"][has_mask]).to(dtype)
    given = {"prompt_embeds": [each.to(dtype) for each in folders.z_image_texts(1)["prompt_embeds"]]}
    picture, where = image(WIDTH, HEIGHT), mask(WIDTH, HEIGHT)
    more = {"mask_image": where} if has_mask else {}
    right = theirs(
        pipeline, "z_image", image=picture, strength=0.7, num_inference_steps=4, guidance_scale=0.0, **given, **more
    )
    more = {"mask": where} if has_mask else {}
    found = ours(opened(pipeline), given, image=picture, strength=0.7, steps=4, **more)
    assert found.dtype == right.dtype == torch.float32
    assert torch.equal(found, right)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 2])
def test_fill(opened: Open, count: int) -> None:
    pipeline, given = folders.flux1("FluxFillPipeline", 384), folders.flux1_texts()
    pictures = {"image": image(120, 80), "mask_image": mask(120, 80)}
    right = theirs(pipeline, "flux1", num_inference_steps=3, **pictures, **repeated(given, count))
    found = ours(
        opened(pipeline), given, steps=3, image=pictures["image"], mask=pictures["mask_image"], num_images=count
    )
    assert torch.equal(found, right)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 2])
def test_control(opened: Open, count: int) -> None:
    pipeline, given = folders.flux1("FluxControlPipeline", 128), folders.flux1_texts()
    picture = image(120, 80)
    right = theirs(pipeline, "flux1", control_image=picture, num_inference_steps=3, **repeated(given, count))
    assert torch.equal(ours(opened(pipeline), given, control=picture, steps=3, num_images=count), right)


def test_kontext(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sizes of few pixels: the trained ones are too many tokens for a test."""
    from diffusers.pipelines.flux import pipeline_flux_kontext

    from xditd.client.pipeline import families

    sizes = [(64, 96), (96, 64), (64, 64)]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    monkeypatch.setattr(families, "KONTEXT_SIZES", sizes)
    pipeline, given, picture = folders.flux1("FluxKontextPipeline"), folders.flux1_texts(), image(90, 60)
    right = theirs(pipeline, "flux1", image=picture, num_inference_steps=2, max_area=HEIGHT * WIDTH, **given)
    assert torch.equal(ours(opened(pipeline), given, references=[picture], steps=2), right)


@pytest.mark.parametrize("kind", ["Flux2Pipeline", "Flux2KleinPipeline"])
def test_references_of_flux2(opened: Open, kind: str) -> None:
    pipeline, given = folders.flux2(kind), folders.flux2_texts()
    pictures = [image(100, 70), image(64, 96, seed=3)]
    of_theirs, of_ours = ({}, {}) if kind == "Flux2Pipeline" else ({"guidance_scale": 1.0}, {"guidance": 1.0})
    right = theirs(pipeline, "flux2", image=pictures, num_inference_steps=3, **given, **of_theirs)
    assert torch.equal(ours(opened(pipeline), given, references=pictures, steps=3, **of_ours), right)


@pytest.mark.parametrize("kind", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_references_of_qwen_image(opened: Open, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With references of few pixels: 1,024 on a side are too many tokens for a test."""
    import importlib

    from xditd.client.pipeline import families

    pipeline, given = folders.qwen_image(kind), folders.qwen_image_texts()
    module = importlib.import_module(type(pipeline).__module__)
    area = 64 * 64
    monkeypatch.setattr(families, "PIXELS", area)
    if kind == "QwenImageEditPlusPipeline":
        monkeypatch.setattr(module, "VAE_IMAGE_SIZE", area)
        pictures: Any = [image(100, 70), image(64, 96, seed=3)]
    else:
        known = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio: known(area, ratio))
        pictures = image(100, 70)
    right = theirs(pipeline, "qwen_image", image=pictures, num_inference_steps=3, **given)
    found = ours(opened(pipeline), given, references=pictures, steps=3, guidance=1.0)
    assert torch.equal(found, right)
