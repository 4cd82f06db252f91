"""``Pipeline`` gives the bits of diffusers' pipeline in half precision, with guidance and LoRAs, on one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lora_files
import pipeline_folders as folders
import pytest
import torch
from pipeline_latents import SEED, SIZE
from pipeline_latents import latents as theirs

from xditd.client import Pipeline

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
