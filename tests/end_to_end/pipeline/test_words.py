"""Words to pictures with the folder's own tokenizers and encoders, as diffusers' pipeline makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flux1_words
import pytest
import torch
from safetensors.torch import save_file

from xditd.client import Client, Pipeline
from xditd.client.demo.checkpoints import flux1_state_dict, flux_vae_state_dict

GIVEN: dict[str, Any] = {"steps": 2, "seed": 1, "width": 96, "height": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline of FLUX.1."""
    return flux1_words.saved(tmp_path_factory.mktemp("words") / "flux")


def theirs(folder: Path, prompt: Any, **given: Any) -> torch.Tensor:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(1)
    found = pipeline(
        prompt, num_inference_steps=2, height=64, width=96, generator=generator, output_type="latent", **given
    )
    return FluxPipeline._unpack_latents(found.images, 64, 96, 8)


@pytest.mark.parametrize("count", [1, 4])
def test_a_prompt(client: Client, folder: Path, count: int) -> None:
    with Pipeline.open(folder, client=client) as pipe:
        found = pipe("a cat", num_images=count, **GIVEN)
        assert torch.equal(found.generation.latents, theirs(folder, "a cat", num_images_per_prompt=count))
        assert (found.seed, found.settings.prompt, len(found.images)) == (1, "a cat", count)
        assert found.to_numpy().shape == (count, 64, 96, 3)


def test_several_prompts(client: Client, folder: Path) -> None:
    prompts = ["a cat", "two dogs (small:1.2) 猫"]
    with Pipeline.open(folder, client=client) as pipe:
        found = pipe(prompts, num_images=2, **GIVEN).generation.latents
    assert torch.equal(found, theirs(folder, prompts, num_images_per_prompt=2))


def test_encoders_in_another_order_and_one_folder_of_tokenizers(client: Client, folder: Path, tmp_path: Path) -> None:
    save_file(flux1_state_dict(3, context_dim=128, pooled_dim=128), tmp_path / "t.safetensors")
    save_file(flux_vae_state_dict(1), tmp_path / "v.safetensors")
    with Pipeline.open(
        transformer=tmp_path / "t.safetensors", vae=tmp_path / "v.safetensors",
        text_encoders=[folder / "text_encoder_2", folder / "text_encoder"], tokenizers=folder,
        scheduler=folder / "scheduler", client=client,
    ) as pipe:  # fmt: skip
        assert torch.equal(pipe("a cat", **GIVEN).generation.latents, theirs(folder, "a cat"))


def test_progress_and_previews(client: Client, folder: Path) -> None:
    steps: list[Any] = []
    previews: list[Any] = []
    with Pipeline.open(folder, client=client) as pipe:

        def show(image: Any, step: int, total: int) -> None:
            previews.append((image.size, step, total))

        pipe("a cat", on_progress=steps.append, on_preview=show, **GIVEN)
        assert previews == [((96, 64), 1, 2), ((96, 64), 2, 2)]
        assert [type(each).__name__ for each in steps if type(each).__name__ == "StepDone"] == ["StepDone"] * 2

        def fail(*_: Any) -> None:
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            pipe("a cat", on_progress=fail, **{**GIVEN, "steps": 50})
        assert pipe("a cat", **GIVEN).count == 1
