"""What a pipeline takes, by the facts of its transformer and the class that its folder names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xditd.client.pipeline.adapter import Adapter
from xditd.client.pipeline.families import adapter_for
from xditd.client.pipeline.files import find_source
from xditd.client.pipeline.folders import PIPELINES
from xditd.client.pipeline.sources import Part, Source

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


def test_a_model_of_references_says_so_when_it_gets_a_picture() -> None:
    found = adapter_for("flux2", facts("reference_latents", starts=()), Source(name="x", parts={}), "x").refused()
    assert found["image"] == "it starts from no picture: give those that the prompt refers to as references="
    assert adapter_for("flux2", facts(starts=()), Source(name="x", parts={}), "x").refused()["image"] == (
        "it makes pictures from words alone"
    )
