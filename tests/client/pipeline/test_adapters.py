"""What a pipeline takes, by the facts of its transformer and the class that its folder names."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
from PIL import Image

from xditd.client.pipeline.adapter import Adapter, Plan
from xditd.client.pipeline.families import PIXELS, adapter_for, area_size
from xditd.client.pipeline.files import find_source
from xditd.client.pipeline.folders import PIPELINES
from xditd.client.pipeline.opening import rules_of
from xditd.client.pipeline.sources import Part, Source
from xditd.ipc.errors import BadRequest

WITHOUT = {
    "flux1": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "qwen_image": ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
}
EDITS = {"flux1": ("FluxKontextPipeline",), "qwen_image": ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")}


def facts(*conditioning: str, starts: tuple[str, ...] = ("image", "mask")) -> Any:
    return SimpleNamespace(
        conditioning=[SimpleNamespace(name=name, is_needed=True) for name in conditioning],
        starts=starts,
        guidance="embedded",
        latents=SimpleNamespace(frames=0),
        options=(),
        has_step_cache=False,
        prompt=None,
    )


def made(family: str, source: Source) -> Adapter:
    return adapter_for(family, facts("prompt_embeds", "reference_latents"), source, "x")


@pytest.mark.parametrize("name", [name for names in WITHOUT.values() for name in names])
def test_a_pipeline_without_references_refuses_them_by_its_name(name: str) -> None:
    refused = made(PIPELINES[name], Source(name="x", parts={}, pipeline_class=name)).refused()
    assert refused["references"].startswith(f"a {name} takes none, as {EDITS[PIPELINES[name]][0]}")
    assert not {"image", "mask", "strength"} & set(refused)


@pytest.mark.parametrize("name", [name for names in EDITS.values() for name in names])
def test_a_pipeline_that_edits_takes_its_picture_as_a_reference(name: str) -> None:
    refused = made(PIPELINES[name], Source(name="x", parts={}, pipeline_class=name)).refused()
    assert "references" not in refused
    assert all(refused[each] == f"a {name} edits references; give references=" for each in ("image", "mask"))


def own_default(pipeline: str, name: str) -> Any:
    """Return what a pipeline of diffusers takes for an argument that is not given."""
    return inspect.signature(getattr(diffusers, pipeline).__call__).parameters[name].default


def opened(family: str, kind: str, given: dict[str, Any] | None = None, **more: Any) -> tuple[Adapter, dict[str, Any]]:
    """Return the rules of a folder, and the defaults of its calls."""
    transformer = facts("prompt_embeds", "control_image" if kind == "FluxControlPipeline" else "reference_latents")
    for name, value in {"width": 64, "height": 64, "frames": 1, "fps": 16, "steps": 3, "guidance_scale": 3.5}.items():
        setattr(transformer, f"default_{name}", value)
    if family != "flux1":
        transformer.guidance = "classifier_free"
    component: Any = SimpleNamespace(family=family, transformer=transformer)
    return rules_of(Source(name="x", parts={}, pipeline_class=kind, **more), component, given)


@pytest.mark.parametrize(
    ("arguments", "kind", "pipeline"),
    [
        ({}, "FluxPipeline", "FluxPipeline"),
        ({"image": "a.png"}, "FluxPipeline", "FluxImg2ImgPipeline"),
        ({"image": "a.png", "mask": "b.png"}, "FluxPipeline", "FluxInpaintPipeline"),
        ({"control": ["net"]}, "FluxPipeline", "FluxControlNetPipeline"),
        ({"control": []}, "FluxPipeline", "FluxPipeline"),
        ({"control": "a.png"}, "FluxControlPipeline", "FluxControlPipeline"),
    ],
)
def test_the_guidance_of_a_call_is_that_of_its_pipeline(arguments: dict[str, Any], kind: str, pipeline: str) -> None:
    """A released folder names one pipeline, and diffusers opens it as others, too."""
    adapter, defaults = opened("flux1", kind)
    given: Any = SimpleNamespace(**{"image": None, "control": None, "defaults": defaults, **arguments})
    assert adapter.default_guidance(given) == own_default(pipeline, "guidance_scale")
    adapter, defaults = opened("flux1", kind, {"guidance": 2.0})
    given.defaults = defaults
    assert adapter.default_guidance(given) == 2.0


@pytest.mark.parametrize(
    ("kind", "settings", "shift", "is_base"),
    [
        ("Flux2KleinPipeline", {}, None, True),
        ("Flux2KleinPipeline", {"is_distilled": False}, None, True),
        ("Flux2KleinPipeline", {"is_distilled": None}, None, True),
        ("Flux2KleinPipeline", {"is_distilled": True}, None, False),
        ("Flux2KleinKVPipeline", {}, None, False),
        ("ZImagePipeline", {}, 6.0, True),
        ("ZImagePipeline", {}, 3.0, False),
    ],
)
def test_a_folder_tells_base_weights_from_distilled_ones(
    kind: str, settings: dict[str, Any], shift: float | None, is_base: bool
) -> None:
    more = {} if shift is None else {"scheduler": {"shift": shift}}
    _, defaults = opened(PIPELINES[kind], kind, settings=settings, **more)
    found = (defaults["guidance"], defaults["steps"])
    if is_base:
        assert found == (own_default(kind, "guidance_scale"), own_default(kind, "num_inference_steps"))
    else:
        assert found == (3.5, 3)


def test_a_strength_that_the_pipeline_was_opened_with_counts_with_a_mask() -> None:
    given: Any = SimpleNamespace(strength=None, mask="b.png")
    for chosen, strength in ((None, own_default("ZImageInpaintPipeline", "strength")), ({"strength": 0.6}, 0.6)):
        adapter, given.defaults = opened("z_image", "ZImagePipeline", chosen)
        assert adapter.strength(given) == strength


@pytest.mark.parametrize("family", WITHOUT)
def test_a_file_says_nothing_of_its_pipeline(family: str) -> None:
    assert not {"references", "image"} & set(made(family, Source(name="x", parts={})).refused())


def test_a_transformer_in_place_of_the_folders_is_not_of_its_pipeline(tmp_path: Path) -> None:
    """Such as that of Kontext, in the folder of dev."""
    parts = '"transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]'
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "FluxPipeline", {parts}}}')
    for role in ("transformer", "vae"):
        (tmp_path / role).mkdir()
    (tmp_path / "kontext.safetensors").touch()
    more: dict[str, Any] = {
        "text_encoders": (), "tokenizers": None, "scheduler": None, "variant": None, "name": None,
    }  # fmt: skip
    own = find_source(tmp_path, parts={}, **more)
    other = find_source(tmp_path, parts={"transformer": tmp_path / "kontext.safetensors"}, **more)
    assert own.parts["transformer"] == Part(str(tmp_path / "transformer"), other.parts["transformer"].kind)
    assert "references" in made("flux1", own).refused()
    assert "references" not in made("flux1", other).refused()


def test_a_transformers_folder_says_itself_how_references_are_modulated(tmp_path: Path) -> None:
    for folder, config in (("own", '{"zero_cond_t": true}'), ("other", "{}")):
        (tmp_path / folder / "transformer").mkdir(parents=True)
        (tmp_path / folder / "transformer" / "config.json").write_text(config)
    (tmp_path / "own" / "vae").mkdir()
    (tmp_path / "file.safetensors").touch()
    parts = '"transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]'
    (tmp_path / "own" / "model_index.json").write_text(f'{{"_class_name": "QwenImageEditPlusPipeline", {parts}}}')
    more: dict[str, Any] = {
        "text_encoders": (), "tokenizers": None, "scheduler": None, "variant": None, "name": None,
    }  # fmt: skip
    for given, variant in ((None, "zero_cond_t"), ("file.safetensors", "zero_cond_t"), ("other/transformer", "class")):
        replaced = {} if given is None else {"transformer": tmp_path / given}
        assert find_source(tmp_path / "own", parts=replaced, **more).variant == variant


def test_a_model_of_references_says_so_when_it_gets_a_picture() -> None:
    found = adapter_for("flux2", facts("reference_latents", starts=()), Source(name="x", parts={}), "x").refused()
    assert found["image"] == "it starts from no picture: give those that the prompt refers to as references="
    assert adapter_for("flux2", facts(starts=()), Source(name="x", parts={}), "x").refused()["image"] == (
        "it makes pictures from words alone"
    )


def call(**given: Any) -> Any:
    sizes = {"width": 64, "height": 64, "frames": 5}
    return SimpleNamespace(width=None, height=None, references=(), image=None, defaults=sizes, **given)


def small(family: str) -> Adapter:
    found = facts("prompt_embeds", "image", "video", "mask", "reference_images")
    found.latents = SimpleNamespace(frames=0, pixels=8, multiple=2)
    return adapter_for(family, found, Source(name="x", parts={}), "x")


def test_pictures_that_are_smaller_than_a_patch_are_named() -> None:
    z_image, dot = small("z_image"), Image.new("RGB", (100, 5))
    with pytest.raises(
        BadRequest, match="image: 100x5 pixels, and x makes 16 or more on a side; give width and height"
    ):
        z_image.size(SimpleNamespace(**{**vars(call()), "image": dot}))
    assert z_image.size(SimpleNamespace(**{**vars(call()), "image": dot, "height": 32})) == (96, 32)
    for narrow in ((5, 5), (1, 2000), (8, 4000)):
        picture = Image.new("RGB", narrow)
        given = SimpleNamespace(**{**vars(call()), "references": (picture,)})
        with pytest.raises(BadRequest, match=r"references\[0\]: .* pixels; give 8 or more on a side"):
            small("wan_vace").add_references(given, Plan(64, 64, 5), lambda pixels: pixels)
    for size in ((1, 2000), (1, 9000), (9000, 1)):
        with pytest.raises(BadRequest, match=f"references: {size[0]}x{size[1]} pixels are .*less narrow"):
            area_size(Image.new("RGB", size), PIXELS)


@pytest.mark.parametrize("given", [5, "control.mp4", Image.new("RGB", (8, 8)), {1: "a.png"}])
def test_a_control_video_is_a_list(given: Any) -> None:
    for name in ("control", "mask"):
        whole = {"control": [Image.new("RGB", (8, 8))] * 5, "mask": None, name: given}
        with pytest.raises(BadRequest, match=f"{name}: .*give a list, a picture for each frame"):
            small("wan_vace").add_control(call(**whole), Plan(64, 64, 5))
