"""Values beside the parts in ``model_index.json``: obeyed, or refused by name where they say something else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xditd.client.pipeline.families import adapter_for
from xditd.client.pipeline.folders import read_folder
from xditd.client.pipeline.sources import Part, Source
from xditd.ipc.errors import BadCheckpoint, Unsupported

WAN = ("WanPipeline", "WanImageToVideoPipeline")
KLEIN = "Flux2KleinPipeline"


def read(folder: Path, pipeline: str, **settings: Any) -> Source:
    parts = {"transformer": ["diffusers", "T"], "vae": ["diffusers", "V"], "transformer_2": [None, None]}
    for role in ("transformer", "vae"):
        (folder / role).mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts, **settings}))
    return read_folder(str(folder), "x")


@pytest.mark.parametrize(
    ("pipeline", "name", "value"),
    [
        (WAN[0], "expand_timesteps", True),
        (WAN[1], "expand_timesteps", False),
        ("WanVACEPipeline", "expand_timesteps", False),
        (WAN[0], "boundary_ratio", 0.9),
        ("FluxPipeline", "boundary_ratio", None),
        (KLEIN, "is_distilled", True),
        ("Flux2Pipeline", "is_distilled", False),
        ("FluxPipeline", "force_zeros_for_empty_prompt", False),
        ("Flux2Pipeline", "text_encoder_out_layers", [10, 20, 30]),
        (KLEIN, "text_encoder_out_layers", [9, 18, 27]),
        ("QwenImagePipeline", "text_encoder_out_layers", None),
    ],
)
def test_a_value_that_is_what_is_computed_stands_in_the_settings(
    tmp_path: Path, pipeline: str, name: str, value: Any
) -> None:
    assert read(tmp_path, pipeline, **{name: value}).settings == {name: value}


@pytest.mark.parametrize(
    ("pipeline", "name", "value", "says"),
    [
        (
            "WanVACEPipeline",
            "expand_timesteps",
            True,
            "=True: a WanVACEPipeline is computed with False",
        ),
        ("FluxPipeline", "is_distilled", True, "is_distilled=True: a FluxPipeline is computed with False"),
        ("FluxPipeline", "boundary_ratio", 0.9, "boundary_ratio=0.9 of FluxPipeline is not known"),
        ("FluxPipeline", "force_zeros_for_empty_prompt", True, "force_zeros_for_empty_prompt=True"),
        ("Flux2Pipeline", "text_encoder_out_layers", [9, 18, 27], r"out_layers=\[9, 18, 27\]: a Flux2Pipeline is comp"),
        (KLEIN, "text_encoder_out_layers", [1, 2], r"out_layers=\[1, 2\]: .* with \[9, 18, 27\]"),
        ("ZImagePipeline", "text_encoder_out_layers", [9, 18, 27], "of ZImagePipeline is not known"),
        ("FluxPipeline", "shift", [3, 4, 5], r"shift=\[3, 4, 5\] of FluxPipeline is not known"),
    ],
)
def test_a_value_that_says_something_else_is_refused_by_name(
    tmp_path: Path, pipeline: str, name: str, value: Any, says: str
) -> None:
    with pytest.raises(Unsupported, match=says):
        read(tmp_path, pipeline, **{name: value})


@pytest.mark.parametrize(
    ("settings", "has_two", "takes_image", "says"),
    [
        ({"expand_timesteps": True}, False, None, "expand_timesteps=True, and this transformer is computed with False"),
        ({"expand_timesteps": False}, False, False, "expand_timesteps=False, and .* with True"),
        ({"expand_timesteps": True}, False, True, "computed with False"),
        ({"boundary_ratio": 0.9}, False, None, "boundary_ratio=0.9 is where a second transformer begins"),
        ({"boundary_ratio": None}, True, None, "boundary_ratio=None: its pipeline never runs transformer_2"),
        ({"boundary_ratio": 3}, True, None, "boundary_ratio=3 is no number above 0, at most 1"),
        ({"boundary_ratio": "a"}, True, None, "boundary_ratio='a' is no number"),
        ({"boundary_ratio": 0.9, "expand_timesteps": False}, True, True, ""),
        ({"boundary_ratio": None, "expand_timesteps": True}, False, False, ""),
        ({}, True, None, "boundary_ratio=None: its pipeline never runs transformer_2"),
        ({}, False, False, "expand_timesteps=False, and .* with True"),
        ({"expand_timesteps": None}, False, None, ""),
        ({}, False, True, ""),
    ],
)
def test_what_a_wan_folder_says_has_to_fit_its_transformers(
    settings: dict[str, Any], has_two: bool, takes_image: bool | None, says: str
) -> None:
    taken = [] if takes_image is None else [SimpleNamespace(name="image", is_needed=takes_image)]
    parts = {role: Part(role) for role in ("transformer", "transformer_2")[: 1 + has_two]}
    source = Source(name="x", parts=parts, settings=settings, pipeline_class=WAN[0])
    facts: Any = SimpleNamespace(conditioning=taken)
    if not says:
        adapter_for("wan", facts, source, "wan (x)")
        return
    with pytest.raises((Unsupported, BadCheckpoint), match=says):
        adapter_for("wan", facts, source, "wan (x)")


def test_the_class_of_a_scheduler_is_that_of_the_index(tmp_path: Path) -> None:
    """Which diffusers makes, of whatever class the settings are."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    UniPCMultistepScheduler(flow_shift=3.0).save_pretrained(tmp_path / "scheduler")
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    own = read(tmp_path, WAN[0], scheduler=["diffusers", saved["_class_name"]]).scheduler
    assert own == saved
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert read_folder(str(tmp_path), "x").scheduler == saved | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler").config.shift == 1.0


def test_a_variant_is_that_of_the_models_that_have_it(tmp_path: Path) -> None:
    """As diffusers loads it: the plain weights of the others."""
    read(tmp_path, "FluxPipeline")
    with pytest.raises(BadCheckpoint, match="no model in it has weights of variant 'fp16'; leave the variant out"):
        read_folder(str(tmp_path), "x", "fp16")
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "transformer" / name).touch()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").touch()
    parts = read_folder(str(tmp_path), "x", "fp16").parts
    assert {role: part.variant for role, part in parts.items()} == {"transformer": "fp16", "vae": None}
    assert {part.variant for part in read_folder(str(tmp_path), "x").parts.values()} == {None}
