"""``Pipeline`` gives the bits of diffusers' pipeline in half precision, with guidance and LoRAs, on one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flux1_words
import lora_files
import pipeline_folders as folders
import pytest
import torch
import wan_models
from flux1_controlnets import MODES, comfyui_state, reference_model
from pipeline_latents import SEED, SIZE
from pipeline_latents import latents as theirs
from pipeline_parts import image, mask

from xditd.client import Client, Control, Pipeline

pytestmark = pytest.mark.usefixtures("convolutions_of_workers")

GUIDED: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "flux1": (folders.flux1, {}, {}),
    "flux2": (
        lambda: folders.flux2("Flux2KleinPipeline", is_distilled=False), {"guidance_scale": 2.5}, {"guidance": 2.5}
    ),
    "qwen_image": (folders.qwen_image, {"true_cfg_scale": 2.5}, {"guidance": 2.5}),
    "z_image": (
        folders.z_image, {"guidance_scale": 2.5, "cfg_normalization": True},
        {"guidance": 2.5, "options": {"cfg_normalization": 1}},
    ),
    "wan": (folders.wan, {"guidance_scale": 3.0, "num_frames": 5}, {"guidance": 3.0, "frames": 5}),
}  # fmt: skip
"""By family: its pipeline, and the arguments of diffusers' call and of ours."""


def in_half(given: Any, dtype: torch.dtype) -> Any:
    return given.to(dtype) if isinstance(given, torch.Tensor) else [in_half(each, dtype) for each in given]


@pytest.mark.parametrize(
    ("dtype", "factors"),
    [(torch.bfloat16, torch.float32), pytest.param(torch.float16, torch.float16, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("family", GUIDED)
def test_guidance_and_two_loras(
    opened: Callable[..., Pipeline], tmp_path: Path, family: str, dtype: torch.dtype, factors: torch.dtype
) -> None:
    """LoRAs of all linear layers, of which diffusers keeps some in float32."""
    make, more, mine = GUIDED[family]
    pipeline = make().to(dtype)
    folder = folders.saved(pipeline, tmp_path / "theirs")
    kind = type(pipeline.transformer)
    pipeline.transformer = kind.from_pretrained(folder / "transformer", torch_dtype=dtype)
    texts: Any = folders.FAMILIES[family][1]
    given = texts(1) if family == "flux1" else texts(1, negative=True)
    given = {name: in_half(each, dtype) for name, each in given.items()}
    pipe = opened(pipeline)
    paths = _loras_of(pipeline.transformer, tmp_path, factors)
    uses = list(zip(paths, (0.7, -0.4), strict=True))

    def latents(loras: Sequence[tuple[Path, float]]) -> torch.Tensor:
        found = pipe(conditioning=given, seed=SEED, steps=3, loras=loras, **SIZE, **mine)
        return found.generation.latents

    plain = latents([])
    assert torch.equal(plain, theirs(pipeline, family, num_inference_steps=3, **given, **more))
    for number, (path, _) in enumerate(uses):
        pipeline.load_lora_weights(path, adapter_name=str(number))
    pipeline.set_adapters([str(number) for number in range(2)], [strength for _, strength in uses])
    right = theirs(pipeline, family, num_inference_steps=3, **given, **more)
    assert torch.equal(latents(uses), right)
    assert not torch.equal(plain, right)


def _loras_of(model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
    shapes = {name: tuple(each.weight.shape) for name, each in model.named_modules() if type(each) is torch.nn.Linear}
    return [
        lora_files.make(shapes, "diffusers", seed, size=0.2, ranks=(4,), dtype=dtype).save(
            folder / f"{seed}.safetensors"
        )
        for seed in range(2)
    ]


@torch.no_grad()
def test_words_are_encoded_in_float32_and_rounded_once(client: Client, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    whole = flux1_words.saved(tmp_path / "whole")
    pipeline = FluxPipeline.from_pretrained(whole, torch_dtype=torch.bfloat16)
    folder = folders.saved(pipeline, tmp_path / "half")
    wide = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    embeds, pooled, _ = wide.encode_prompt("a cat", None)
    given = {"prompt_embeds": embeds.bfloat16(), "pooled_prompt_embeds": pooled.bfloat16()}
    right = theirs(pipeline, "flux1", num_inference_steps=2, **given)
    with Pipeline.open(folder, client=client) as pipe:
        found = pipe("a cat", seed=SEED, steps=2, **SIZE).generation.latents
    assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_two_controlnets(opened: Callable[..., Pipeline], tmp_path: Path, dtype: torch.dtype) -> None:
    """Scales that half precision rounds; one ControlNet begins later."""
    from diffusers import FluxControlNetPipeline, FluxMultiControlNetModel

    plain = folders.flux1().to(dtype)
    pipe, scales = opened(plain), [0.7, 0.35]
    nets = [reference_model(comfyui_state(seed, modes=MODES)).to(dtype) for seed in (5, 6)]
    pipeline = FluxControlNetPipeline(**plain.components, controlnet=FluxMultiControlNetModel(nets))
    pipeline.set_progress_bar_config(disable=True)
    given = {name: each.to(dtype) for name, each in folders.flux1_texts().items()}
    sides = {"height": folders.HEIGHT, "width": folders.WIDTH}
    pictures = [pipeline.image_processor.preprocess(image(120, 80, seed=seed), **sides) for seed in (1, 2)]
    right = theirs(
        pipeline, "flux1", control_image=pictures, control_mode=[1, 3], controlnet_conditioning_scale=scales,
        control_guidance_start=[0.0, 0.3], control_guidance_end=[1.0, 1.0], num_inference_steps=3, **given,
    )  # fmt: skip
    for number, net in enumerate(nets):
        net.save_pretrained(tmp_path / f"net{number}")
    loans = [pipe.client.lend(tmp_path / f"net{number}") for number in range(2)]
    controls = [
        Control(loan, picture, scale=scale, mode=mode, start=start)
        for loan, picture, scale, mode, start in zip(loans, pictures, scales, (1, 3), (0.0, 0.3), strict=True)
    ]
    found = pipe(conditioning=given, control=controls, seed=SEED, steps=3, **SIZE).generation.latents
    for each in loans:
        each.return_()
    assert torch.equal(found, right)


PICTURE, MASK = image(120, 80), mask(120, 80)
VIDEO = {"guidance_scale": 3.0, "num_frames": 5}
IMAGE_TO_VIDEO = {"image_processor": None, "image_encoder": None}
WITH_PICTURES: dict[str, tuple[Callable[[], Any], str, dict[str, Any], dict[str, Any]]] = {
    "fill": (
        lambda: folders.flux1("FluxFillPipeline", 384), "flux1", {"image": PICTURE, "mask_image": MASK},
        {"image": PICTURE, "mask": MASK},
    ),
    "control": (
        lambda: folders.flux1("FluxControlPipeline", 128), "flux1", {"control_image": PICTURE}, {"control": PICTURE}
    ),
    "references": (folders.flux2, "flux2", {"image": [PICTURE]}, {"references": [PICTURE]}),
    "inpaint": (
        lambda: folders.qwen_image("QwenImageInpaintPipeline"), "qwen_image",
        {"image": PICTURE, "mask_image": MASK, "strength": 0.7, "true_cfg_scale": 2.5},
        {"image": PICTURE, "mask": MASK, "strength": 0.7, "guidance": 2.5},
    ),
    "first frame": (
        lambda: folders.wan("WanImageToVideoPipeline", wan_models.CONFIGS["image"], **IMAGE_TO_VIDEO), "wan",
        {"image": PICTURE, **VIDEO}, {"image": PICTURE},
    ),
    "first frame of TI2V": (
        lambda: folders.wan(
            "WanImageToVideoPipeline", wan_models.CONFIGS["TI2V"], expand_timesteps=True, **IMAGE_TO_VIDEO
        ), "wan", {"image": PICTURE, **VIDEO}, {"image": PICTURE},
    ),
    "VACE": (
        lambda: folders.wan("WanVACEPipeline", wan_models.TWO_CONTROLS), "wan",
        {"video": [PICTURE] * 5, "mask": [MASK] * 5, "conditioning_scale": 0.7, **VIDEO},
        {"control": [PICTURE] * 5, "mask": [MASK] * 5, "options": {"conditioning_scale": 0.7}},
    ),
}  # fmt: skip
"""A pipeline, its family, and the arguments of diffusers' call and of ours."""


@pytest.mark.parametrize(
    ("name", "vae"),
    [
        (name, dtype)
        for name, (_, family, _, _) in WITH_PICTURES.items()
        for dtype in (torch.bfloat16, *([torch.float32] if family == "wan" else []))
    ],
)
def test_pictures(opened: Callable[..., Pipeline], tmp_path: Path, name: str, vae: torch.dtype) -> None:
    """Beside a VAE in float32, too, where diffusers takes one: others give it pictures in the dtype of texts."""
    make, family, more, mine = WITH_PICTURES[name]
    pipeline = make().to(torch.bfloat16)
    folder = folders.saved(pipeline, tmp_path / "theirs")
    for part, dtype in (("transformer", torch.bfloat16), ("vae", vae)):
        kind = type(getattr(pipeline, part))
        setattr(pipeline, part, kind.from_pretrained(folder / part, torch_dtype=dtype))
    texts: Any = folders.FAMILIES[family][1]
    given = texts(1, negative=True) if family in ("wan", "qwen_image") else texts(1)
    given = {name: in_half(each, torch.bfloat16) for name, each in given.items()}
    right = theirs(pipeline, family, num_inference_steps=3, **given, **more)
    video = {"frames": 5, "guidance": 3.0} if family == "wan" else {}
    found = opened(pipeline)(conditioning=given, seed=SEED, steps=3, **SIZE, **mine, **video)
    assert torch.equal(found.generation.latents, right)
