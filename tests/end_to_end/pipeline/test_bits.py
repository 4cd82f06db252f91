"""``Pipeline`` gives the bits of diffusers' pipeline with the same folder, on one worker in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipeline_folders as folders
import pytest
import torch
from pipeline_folders import HEIGHT, WIDTH

from xditd.client import Client, Pipeline

SEED = 1
SIZE = {"height": HEIGHT, "width": WIDTH}


@pytest.fixture(scope="module", autouse=True)
def as_many_threads_as_the_worker() -> Iterator[None]:
    """Sums over another number of threads may differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def client(one_worker: Any) -> Iterator[Client]:
    with one_worker.connect() as connected:
        yield connected


@pytest.fixture
def opened(client: Client, tmp_path: Path) -> Callable[[Any], Pipeline]:
    """Save a pipeline, and open its folder."""

    def open_folder(pipeline: Any, **more: Any) -> Pipeline:
        return Pipeline.open(folders.saved(pipeline, tmp_path / "model"), client=client, **more)

    return open_folder


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(SEED)


def latents_of(found: Any, family: str) -> torch.Tensor:
    """Return the latents of a pipeline's result as ours are shaped."""
    from diffusers import FluxPipeline, QwenImagePipeline

    latents = found.frames if hasattr(found, "frames") else found.images
    if family == "flux1":
        return FluxPipeline._unpack_latents(latents, HEIGHT, WIDTH, 8)
    if family == "qwen_image":
        return QwenImagePipeline._unpack_latents(latents, HEIGHT, WIDTH, 8).squeeze(2)
    return latents


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("family", ["flux1", "flux2", "qwen_image", "z_image", "wan"])
def test_words_to_pictures(opened: Callable[..., Pipeline], family: str, count: int) -> None:
    make, texts = folders.FAMILIES[family]
    pipeline = make()
    given = {"num_inference_steps": 3, "generator": generator(), "output_type": "latent", **SIZE}
    video = {"num_frames": 5, "num_videos_per_prompt": count} if family == "wan" else {"num_images_per_prompt": count}
    right = pipeline(**texts(1), **given, **video)
    pipe = opened(pipeline)
    ours = pipe(
        conditioning=texts(1), steps=3, seed=SEED, num_images=count, **SIZE, **({"frames": 5} if family == "wan" else {}),
        **({"guidance": 1.0} if family == "qwen_image" else {"guidance": 0.0} if family == "z_image" else {}),
    )  # fmt: skip
    latents = ours.generation.latents
    assert torch.equal(latents, latents_of(right, family))
    assert len(ours.images) == (5 if family == "wan" else count)
