"""Words to pictures with the folder's own tokenizers and encoders, as diffusers' pipeline makes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import flux1_words
import pipeline_folders as folders
import prompt_pipelines
import pytest
import qwen2_5_vl_models
import qwen_image_models
import torch
from pipeline_latents import latents
from safetensors.torch import save_file

from xditd.client import Client, Pipeline
from xditd.client.demo.checkpoints import flux1_state_dict, flux_vae_state_dict
from xditd.ipc.errors import BadRequest

LONG = "a cat in a hat on a sofa beside two dogs under a lamp"
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


def test_the_second_prompt_is_what_t5_reads(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seconds = ["a cat", "two dogs"], ["a hat", "猫"]
    with Pipeline.open(folder, client=client) as pipe:
        asked, encode = [], client.encode_prompt
        monkeypatch.setattr(
            client, "encode_prompt", lambda *given, **more: asked.append(more) or encode(*given, **more)
        )
        one = pipe("a cat", prompt_2="a hat", **GIVEN)
        assert [each["prompt_2"] for each in asked] == [["a hat"]]  # each encoder runs once
        several = pipe(prompts, prompt_2=seconds, num_images=2, **GIVEN).generation.latents
        empty = pipe("a cat", prompt_2=[""], **GIVEN).generation.latents
        for given, says in (
            ({"prompt_2": ["a", "b", "c"]}, "prompt_2: 3 for 1 prompts; give one, or one for each"),
            ({"prompt_2": 3}, "prompt_2: 3 is no text"),
            ({"prompt_2": ""}, "prompt_2: an empty text, for which diffusers takes the prompt: leave it out, or give"),
            ({"weights": True}, "cannot honour weights: its pipeline has no weights in prompts"),
        ):
            with pytest.raises(BadRequest, match=says):
                pipe("a cat", **GIVEN, **given)
    assert torch.equal(one.generation.latents, theirs(folder, "a cat", prompt_2="a hat"))
    assert not torch.equal(one.generation.latents, theirs(folder, "a cat"))
    assert torch.equal(empty, theirs(folder, "a cat", prompt_2=[""]))
    assert torch.equal(theirs(folder, "a cat", prompt_2=""), theirs(folder, "a cat"))
    assert torch.equal(several, theirs(folder, prompts, prompt_2=seconds, num_images_per_prompt=2))
    assert one.settings.prompts_2 == ("a hat",)


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


# --- Other families --------------------------------------------------------------------------------


def with_words(pipeline: Any, family: str, parts: Path) -> Any:
    """Give a pipeline a text encoder and a tokenizer, which are saved in ``parts``."""
    prompt_pipelines.save_texts(family, parts)
    pipeline.register_modules(**prompt_pipelines.read_texts(family, parts))
    return pipeline


def qwen_image_pipeline() -> Any:
    config = prompt_pipelines.QWEN_IMAGE
    pipeline = folders.qwen_image()
    pipeline.register_modules(transformer=qwen_image_models.reference(qwen_image_models.state_dict(0, config), config))
    return pipeline


GUIDED = ({"guidance_scale": 2.5}, {"guidance": 2.5})
WORDS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "z_image": (folders.z_image, *GUIDED),
    "flux2_dev": (folders.flux2, *GUIDED),
    "flux2_klein": (partial(folders.flux2, "Flux2KleinPipeline", is_distilled=False), *GUIDED),
    "wan": (folders.wan, {"guidance_scale": 2.5, "num_frames": 5}, {"guidance": 2.5, "frames": 5}),
    "qwen_image": (
        qwen_image_pipeline, {"true_cfg_scale": 2.5, "negative_prompt": "a dog"},
        {"guidance": 2.5, "negative_prompt": "a dog"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["flux1", *WORDS])
def test_the_length_of_prompts(opened: Callable[..., Pipeline], folder: Path, family: str, tmp_path: Path) -> None:
    """Shorter and, where a family takes them, longer ones than the pipeline's own have its bits, too."""
    if family == "flux1":
        with Pipeline.open(folder, client=opened(folders.flux1()).client) as pipe:
            assert pipe.defaults["max_sequence_length"] == 512
            short = pipe(LONG, max_sequence_length=7, **GIVEN)
            assert torch.equal(short.generation.latents, theirs(folder, LONG, max_sequence_length=7))
            assert not torch.equal(short.generation.latents, pipe(LONG, **GIVEN).generation.latents)
            assert (short.settings.max_sequence_length, short.record().max_sequence_length) == (7, 7)
            assert pipe(LONG, max_sequence_length=512, **GIVEN).settings.max_sequence_length is None
            for given, says in (
                ({"max_sequence_length": 513}, "^max_sequence_length is 513; use a whole number from 1 to 512"),
                ({"max_sequence_length": 7.5}, "max_sequence_length: 7.5 is not a whole number"),
            ):
                with pytest.raises(BadRequest, match=says):
                    pipe(LONG, **GIVEN, **given)
            with pytest.raises(BadRequest, match="max_sequence_length beside conditioning"):
                pipe(conditioning={}, max_sequence_length=7)
        return
    make, of_theirs, of_ours = WORDS[family]
    pipeline = with_words(make(), family, tmp_path / "parts")
    pipe = opened(pipeline, defaults={"max_sequence_length": 14})
    right = latents(
        pipeline,
        family.removesuffix("_dev").removesuffix("_klein"),
        prompt=LONG,
        num_inference_steps=2,
        max_sequence_length=14,
        **of_theirs,
    )
    assert torch.equal(pipe(LONG, **GIVEN, **of_ours).generation.latents, right)
    own = pipe(LONG, max_sequence_length=512, **GIVEN, **of_ours)
    assert not torch.equal(own.generation.latents, right)


@pytest.mark.parametrize("family", WORDS)
def test_words_of_other_families(opened: Callable[..., Pipeline], family: str, tmp_path: Path) -> None:
    """With guidance, by the negative prompt that the pipeline takes if none is given."""
    make, of_theirs, of_ours = WORDS[family]
    pipeline = with_words(make(), family, tmp_path / "parts")
    pipe = opened(pipeline)
    right = latents(
        pipeline, family.removesuffix("_dev").removesuffix("_klein"), prompt="a cat", num_inference_steps=2, **of_theirs
    )
    found = pipe("a cat", **GIVEN, **of_ours)
    assert torch.equal(found.generation.latents, right)


@pytest.mark.parametrize(
    "family", [each if each == "qwen_image" else pytest.param(each, marks=pytest.mark.long) for each in WORDS]
)
def test_several_prompts_of_other_families(opened: Callable[..., Pipeline], family: str, tmp_path: Path) -> None:
    """Of different lengths: embeddings of Qwen-Image have a mask."""
    prompts, negatives = ["a cat", f"{LONG} (small:1.2) 猫，&amp; “x”", ""], ["", "a dog in the rain", "x"]
    make, of_theirs, of_ours = WORDS[family]
    pipeline = with_words(make(), family, tmp_path / "parts")
    texts = {"prompt": prompts} | ({} if family.startswith("flux2") else {"negative_prompt": negatives})
    count = 2
    if family == "qwen_image":  # whose pipeline has the masks of several images for each prompt in another order
        count, texts = 1, {name: [each for each in given for _ in range(2)] for name, given in texts.items()}
    name = "num_videos_per_prompt" if family == "wan" else "num_images_per_prompt"
    pipe = opened(pipeline)
    right = latents(
        pipeline,
        family.removesuffix("_dev").removesuffix("_klein"),
        num_inference_steps=2,
        **{**of_theirs, name: count, **{name: list(given) for name, given in texts.items()}},  # Z-Image changes lists
    )
    found = pipe(texts.pop("prompt"), num_images=count, **{**GIVEN, **of_ours, **texts})
    assert torch.equal(found.generation.latents, right)
    if family == "qwen_image":
        again = pipe(prompts, num_images=2, **{**GIVEN, **of_ours, "negative_prompt": negatives})
        assert torch.allclose(again.generation.latents, right, atol=1e-4)  # encoders read other batches


@pytest.mark.parametrize("kind", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_words_with_pictures(
    opened: Callable[..., Pipeline], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder sees the reference: another one gives another picture."""
    from xditd.client.pipeline import families

    monkeypatch.setattr(families, "PIXELS", 64 * 64)
    plain = with_words(qwen_image_pipeline(), "qwen_image", tmp_path / "parts")
    pipeline = getattr(diffusers, kind)(**{**plain.components, "processor": None})
    pipe = opened(pipeline, tokenizers={"processor": tmp_path / "parts" / "processor"})
    seen, picture = [], qwen2_5_vl_models.picture(90, 64)
    encode = pipe.client.encode_prompt
    monkeypatch.setattr(
        pipe.client, "encode_prompt", lambda *given, **more: seen.append(more) or encode(*given, **more)
    )
    pipe("make it blue", references=[picture], negative_prompt=" ", guidance=2.0, **GIVEN)
    (given,) = seen
    assert [each.size for each in given["images"]] == [(90, 64)]  # which the workers resize
    assert given["options"] == ({"edit": True} if kind == "QwenImageEditPipeline" else None)
    assert set(given["tokenizers"]) == {"processor"}
    with pytest.raises(BadRequest, match="cannot honour max_sequence_length: its prompts have one length"):
        pipe("make it blue", references=[picture], max_sequence_length=20, **GIVEN)
