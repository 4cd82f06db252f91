"""Every argument of a call changes the result, or is refused by its name: for each family and variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flux1_variants
import flux1_words
import pipeline_folders as folders
import pytest
import torch
import wan_models
from pipeline_parts import image, mask
from safetensors.torch import save_file

from xditd.client import BadCheckpoint, BadRequest, Pipeline, Unsupported
from xditd.client.demo.checkpoints import flux_vae_state_dict
from xditd.client.metadata.of_runs import record_of_run
from xditd.client.pipeline import families
from xditd.client.pipeline.calls import ARGUMENTS

PICTURE, MASK = image(96, 64), mask(96, 64)
FRAMES = [image(96, 64, seed=number) for number in range(5)]


@dataclass(frozen=True)
class Case:
    """A pipeline, what its calls need, and values of the arguments that it takes besides those of all pipelines."""

    make: Callable[[], Any]
    texts: Callable[..., dict[str, Any]]
    needs: dict[str, Any] = field(default_factory=dict)
    takes: dict[str, Any] = field(default_factory=dict)
    is_guided: bool = False


STARTS = {"image": PICTURE, "strength": {"image": PICTURE, "strength": 0.3}, "mask": {"image": PICTURE, "mask": MASK}}
VIDEO: dict[str, Any] = {"frames": 9, "guidance": 2.0, "options": {"shift": 2.0}}
CASES = {
    "FLUX.1 dev": Case(
        folders.flux1, folders.flux1_texts,
        takes={**STARTS, "guidance": 2.0, "step_cache": 1.0},
    ),
    "FLUX.1 Kontext": Case(
        lambda: folders.flux1("FluxKontextPipeline"), folders.flux1_texts,
        takes={"guidance": 2.0, "references": [PICTURE], "step_cache": 1.0},
    ),
    "FLUX.1 Fill": Case(
        lambda: folders.flux1("FluxFillPipeline", 384), folders.flux1_texts,
        needs={"image": PICTURE, "mask": MASK},
        takes={"guidance": 2.0, "step_cache": 1.0, "image": FRAMES[0], "mask": image(96, 64)},
    ),
    "FLUX.1 Depth": Case(
        lambda: folders.flux1("FluxControlPipeline", 128), folders.flux1_texts,
        needs={"control": PICTURE}, takes={"guidance": 2.0, "step_cache": 1.0, "control": FRAMES[0]},
    ),
    "FLUX.2 dev": Case(
        folders.flux2, folders.flux2_texts,
        takes={"guidance": 2.0, "references": [PICTURE]},
    ),
    "Qwen-Image": Case(
        folders.qwen_image, folders.qwen_image_texts, is_guided=True,
        takes={**STARTS, "guidance": 2.0, "options": {"shift": 2.0}},
    ),
    "Qwen-Image-Edit": Case(
        lambda: folders.qwen_image("QwenImageEditPlusPipeline"), folders.qwen_image_texts, is_guided=True,
        needs={"references": [PICTURE]},
        takes={"guidance": 2.0, "references": [FRAMES[0]], "options": {"shift": 2.0}},
    ),
    "Z-Image": Case(
        folders.z_image, folders.z_image_texts, is_guided=True,
        takes={**STARTS, "guidance": 2.0, "options": {"shift": 2.0}},
    ),
    "Wan": Case(folders.wan, folders.wan_texts, needs={"frames": 5}, is_guided=True, takes=VIDEO),
    "Wan I2V": Case(
        lambda: folders.wan("WanImageToVideoPipeline", wan_models.IMAGE, image_processor=None, image_encoder=None),
        folders.wan_texts, needs={"frames": 5, "image": PICTURE}, is_guided=True,
        takes={**VIDEO, "image": FRAMES[0], "last_image": FRAMES[1]},
    ),
    "Wan VACE": Case(
        lambda: folders.wan("WanVACEPipeline", wan_models.TWO_CONTROLS), folders.wan_texts, needs={"frames": 5},
        is_guided=True,
        takes={
            **VIDEO, "control": FRAMES, "mask": {"control": FRAMES, "mask": [MASK] * 5}, "references": [PICTURE],
        },
    ),
}  # fmt: skip
SHORT = ("FLUX.1 dev", "Z-Image", "Wan VACE")
"""The pipelines that each test run covers; the others are for long runs."""
OF_ALL = {
    "width": 64,
    "height": 96,
    "steps": 3,
    "sigmas": [0.9, 0.4],
    "seed": 2,
    "num_images": 2,
}
"""Arguments of every pipeline."""
VALUES = {
    "negative_prompt": "a dog",
    "image": PICTURE,
    "mask": MASK,
    "last_image": PICTURE,
    "references": [PICTURE],
    "control": PICTURE,
    "frames": 5,
    "guidance": 2.0,
    "strength": 0.5,
    "options": {"shift": 2.0},
    "step_cache": 0.5,
}
"""Arguments that some pipelines refuse."""
ELSEWHERE = {
    "prompt",
    "negative_prompt",
    "loras",
    "conditioning",
    "prompt_2",
    "max_sequence_length",
    "weights",
    "on_progress",
    "on_preview",
    "deadline_s",
}
"""Arguments with tests of their own."""


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in SHORT else pytest.mark.long) for each in CASES]
)
def test_each_argument_acts_or_is_refused(
    opened: Callable[..., Pipeline], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "PIXELS", 64 * 64)  # of references: many more are many tokens
    monkeypatch.setattr(families, "KONTEXT_SIZES", [(64, 96), (96, 64)])
    case = CASES[name]
    pipe = opened(case.make())
    off = 0.0 if name == "Z-Image" else 1.0
    base = {"steps": 2, "seed": 1, "width": 96, "height": 64, **({"guidance": off} if case.is_guided else {})}

    def run(**given: Any) -> torch.Tensor:
        guided = case.is_guided and given.get("guidance", base.get("guidance")) > off
        texts = case.texts(1, negative=guided) if case.is_guided else case.texts(1)
        return pipe(conditioning=texts, **{**base, **case.needs, **given}).generation.latents

    plain = run()
    assert torch.equal(plain, run())
    assert set(pipe.arguments) == set(ARGUMENTS)
    for argument in (each for each in ARGUMENTS if each not in ELSEWHERE):
        if pipe.arguments[argument]:
            assert argument not in case.takes, argument
            with pytest.raises(BadRequest, match=rf"cannot honour {argument}: "):
                run(**{argument: VALUES[argument]})
            continue
        value = OF_ALL.get(argument, case.takes.get(argument))
        if value is None:
            assert argument in ("control", "options", "negative_prompt"), f"{argument} has no value in the table"
            continue
        given = value if isinstance(value, dict) and argument in value else {argument: value}
        found = run(**given)
        assert found.shape != plain.shape or not torch.equal(found, plain), argument


def test_a_lora_acts(opened: Callable[..., Pipeline], tmp_path: Any) -> None:
    pipeline = folders.flux1()
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    factors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": folders.rows(1, 4, layer.in_features),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": folders.rows(2, layer.out_features, 4),
    }
    save_file(factors, tmp_path / "style.safetensors")
    pipe, texts = opened(pipeline), folders.flux1_texts()
    given = {"conditioning": texts, "steps": 2, "seed": 1, "width": 96, "height": 64}
    plain = pipe(**given).generation.latents
    path = tmp_path / "style.safetensors"
    with_lora = pipe(**given, loras=[(path, 0.8)])
    assert not torch.equal(with_lora.generation.latents, plain)
    assert torch.equal(pipe(**given, loras=[(path, 0.0)]).generation.latents, plain)
    assert [each[:3] for each in with_lora.settings.loras] == [(str(path), 0.8, ("transformer",))]
    assert sum("style" in each.label for each in pipe.client.status().components) == 1
    with pytest.raises(BadRequest, match="give pairs"):
        pipe(**given, loras=["style.safetensors"])


def test_a_lora_of_an_encoder_that_is_not_there_is_refused(opened: Callable[..., Pipeline], tmp_path: Path) -> None:
    """Its layers would have no effect; with the encoder, words are encoded with them, and tensors are not."""
    layers = {
        "transformer.transformer_blocks.0.attn.to_q": flux1_variants.state_of(64)["img_in.weight"].shape[0],
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 128,
    }
    factors = {}
    for name, width in layers.items():
        outer = 4 * width if name.endswith("fc1") else width
        factors[f"{name}.lora_A.weight"] = 0.1 * folders.rows(1, 4, width)
        factors[f"{name}.lora_B.weight"] = folders.rows(2, outer, 4)
    path = tmp_path / "style.safetensors"
    save_file(factors, path)
    pipe = opened(folders.flux1())
    with pytest.raises(Unsupported, match=rf"{path}: it has layers of a text encoder \(clip_l\), and model0 has"):
        pipe(conditioning=folders.flux1_texts(), loras=[(path, 1.0)], steps=1, width=96, height=64)
    whole = flux1_words.saved(tmp_path / "flux")
    with Pipeline.open(whole, client=pipe.client) as words:
        given: dict[str, Any] = {"steps": 1, "seed": 1, "width": 96, "height": 64}
        assert words("a cat", loras=[(path, 1.0)], **given).settings.loras[0].roles == ("transformer", "text_encoder")
        widths = {"prompt_embeds": folders.rows(1, 1, 9, 128), "pooled_prompt_embeds": folders.rows(2, 1, 128)}
        tensors = words(conditioning=widths, loras=[(path, 1.0)], **given)
        assert tensors.settings.loras[0].roles == ("transformer",)


def test_a_pair_of_transformers_asks_which_one_a_lora_is_for(opened: Callable[..., Pipeline]) -> None:
    pipe = opened(folders.wan(transformer_2=wan_models.reference(wan_models.state_dict(1)), boundary_ratio=0.8))
    with pytest.raises(BadRequest, match=r"two transformers; say which one has x\.safetensors"):
        pipe(conditioning=folders.wan_texts(), frames=5, loras=[("x.safetensors", 0.8)])


def test_the_role_of_a_lora_is_in_the_metadata(opened: Callable[..., Pipeline], tmp_path: Any) -> None:
    pipeline = folders.wan(transformer_2=wan_models.reference(wan_models.state_dict(1)), boundary_ratio=0.8)
    layer = pipeline.transformer.blocks[0].attn1.to_q
    factors = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": folders.rows(1, 4, layer.in_features),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": folders.rows(2, layer.out_features, 4),
    }
    paths = [tmp_path / "high.safetensors", tmp_path / "low.safetensors"]
    for path in paths:
        save_file(factors, path)
    pipe = opened(pipeline)
    roles = ("transformer", "transformer_2")
    loras = [(path, 0.8, role) for path, role in zip(paths, roles, strict=True)]
    given = {"conditioning": folders.wan_texts(), "frames": 5, "steps": 3, "seed": 1, "width": 64, "height": 64}
    found = pipe(**given, loras=loras)
    assert [each[:3] for each in found.settings.loras] == [(str(path), 0.8, (role,)) for path, _, role in loras]
    record = record_of_run(found.settings, 0, 1)
    assert [(each.file.name, each.roles) for each in record.loras] == [
        ("high.safetensors", ("transformer",)),
        ("low.safetensors", ("transformer_2",)),
    ]
    exchanged = pipe(**given, loras=[(path, 0.8 * (role == "transformer"), role) for path, _, role in loras])
    assert not torch.equal(exchanged.generation.latents, found.generation.latents)


def test_wrong_values_are_named(opened: Callable[..., Pipeline]) -> None:
    pipe, texts = opened(folders.flux1()), folders.flux1_texts()
    for given, message in (
        ({}, "prompt, conditioning: give either"),
        ({"prompt": "a cat", "conditioning": texts}, "prompt, conditioning: give either"),
        ({"prompt": ["a cat", 1]}, r"prompt: .* is no text"),
        ({"conditioning": texts, "seed": -1}, "seed: -1 is not a whole number"),
        ({"conditioning": texts, "num_images": 65}, "num_images: 65 is not a whole number from 1 to 64"),
        ({"conditioning": texts, "steps": 2.5}, r"steps: 2.5 is not a whole number"),
        ({"conditioning": texts, "guidance": float("nan")}, "guidance: nan is not a finite number"),
        ({"conditioning": texts, "image": 5}, "image: 5 of type int is no picture"),
        ({"conditioning": texts, "on_progress": 5}, "on_progress: 5 of type int cannot be called; give a function"),
        ({"conditioning": texts, "on_preview": "a"}, "on_preview: 'a' of type str cannot be called"),
        ({"conditioning": 5}, "conditioning: 5 of type int; give a dict of tensors by name"),
        ({"conditioning": texts, "references": 5}, "cannot honour references"),
        ({"conditioning": texts, "image": "gone.png"}, "image: gone.png: no such file or folder"),
        ({"conditioning": texts, "loras": [("gone.safetensors", 1.0)]}, r"loras: .*gone\.safetensors: no such file"),
        ({"conditioning": texts, "stepz": 3}, "stepz: no argument of Pipeline; did you mean steps"),
        ({"conditioning": texts, "mask": MASK}, "mask without image"),
        ({"conditioning": texts, "strength": 0.5}, "strength 0.5 without image would have no effect"),
        (
            {"conditioning": texts, "image": PICTURE, "strength": 0.0, "steps": 4},
            "strength 0 of 4 steps",
        ),
        (
            {"conditioning": texts, "references": [PICTURE]},
            "cannot honour references: a FluxPipeline takes none, as FluxKontextPipe",
        ),
        ({"conditioning": texts, "control": PICTURE}, "control: .* takes ControlNets"),
        ({"conditioning": texts, "options": {"shift": 2.0}}, "cannot honour options: (?!options)"),
        ({"conditioning": texts, "loras": "x.safetensors"}, r"loras: 'x.safetensors' is of type str; give pairs"),
    ):
        with pytest.raises((BadRequest, BadCheckpoint), match=message):
            pipe(width=96, height=64, **given)  # type: ignore[arg-type]


def test_defaults_that_the_model_cannot_honour_are_refused(opened: Callable[..., Pipeline]) -> None:
    pipe = opened(folders.flux1())
    path = Path(pipe.files["vae"][0]).parent
    for wrong, message in (
        ({"frames": 5}, "defaults: flux1 .* cannot honour frames: it makes pictures, no videos; leave it out"),
        ({"fps": 24}, "cannot honour fps: it makes pictures"),
        ({"negative_prompt": "a dog"}, "cannot honour negative_prompt: it has no classifier-free guidance"),
        ({"strength": 7.0}, "defaults: strength: 7.0 is not a number from 0 to 1"),
        ({"strength": -1}, "defaults: strength: -1 is not a number from 0 to 1"),
        ({"guidance": -3.0}, "defaults: guidance: -3.0 is not a number from 0 to 1000"),
    ):
        with pytest.raises(BadRequest, match=message):
            Pipeline.open(path, client=pipe.client, defaults=wrong)
    with Pipeline.open(path, client=pipe.client, defaults={**pipe.defaults, "steps": 3}) as other:
        assert other.defaults == {**pipe.defaults, "steps": 3}


@pytest.mark.long
def test_pictures_that_exclude_each_other_are_named(opened: Callable[..., Pipeline], tmp_path: Any) -> None:
    """A file of FLUX.1 does not say whether it is Kontext: it takes a picture to start from, or a reference."""
    save_file(flux1_variants.state_of(64), tmp_path / "t.safetensors")
    save_file(flux_vae_state_dict(1), tmp_path / "v.safetensors")
    texts = folders.flux1_texts()
    with Pipeline.open(
        transformer=tmp_path / "t.safetensors", vae=tmp_path / "v.safetensors", client=opened(folders.flux1()).client
    ) as pipe:
        for given, message in (
            ({"image": PICTURE, "references": [PICTURE]}, "image beside references"),
            ({"references": [PICTURE] * 2}, "references: 2; .* takes one"),
        ):
            with pytest.raises(BadRequest, match=message):
                pipe(conditioning=texts, width=96, height=64, **given)
