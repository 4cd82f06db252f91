"""``xditd generate --from``: what a file's metadata say, what flags replace, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from PIL import Image

from xditd import __version__
from xditd.client import models_editing, models_file
from xditd.client.cli.main import build_parser
from xditd.client.cli.repeating import apply_record
from xditd.client.image_files import encode_image
from xditd.client.metadata.file_hashes import describe
from xditd.client.metadata.of_runs import files_of
from xditd.client.metadata.record import FileRecord, InputsRecord, LoraRecord, ModelRecord, Record, encode
from xditd.client.pipeline.settings import RunSettings
from xditd.ipc.errors import BadRequest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model named flux."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    models_editing.add("flux", {"folder": "/flux"}, models_file.models_path())
    return tmp_path


RECORD = Record(
    version=__version__,
    prompt="a cat",
    negative_prompt="a dog",
    seed=7,
    width=64,
    height=48,
    frames=5,
    fps=24,
    steps=3,
    guidance=2.5,
    step_cache=0.08,
    options={"shift": 3.0, "cfg_truncation": 0.5},
    compute_dtype="float16",
    model=ModelRecord(name="flux", family="flux1"),
)


def parsed(record: Record, *given: str) -> argparse.Namespace:
    Path("cat.png").write_bytes(encode_image(Image.new("RGB", (8, 8)), "PNG", encode(record)))
    found = build_parser().parse_args(["generate", "--from", "cat.png", *given])
    apply_record(found)
    return found


def test_everything_is_as_the_file_says() -> None:
    found = parsed(RECORD)
    expected = {
        "prompt": "a cat", "negative_prompt": "a dog", "model": "flux", "seed": 7, "size": (64, 48), "frames": 5,
        "fps": 24, "steps": 3, "guidance": 2.5, "step_cache": 0.08, "option": {"shift": 3.0, "cfg_truncation": 0.5},
        "compute_dtype": "float16", "num_images": None, "lora": None, "embeds": None,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.repeated.index is None
    assert found.repeated.checks_model


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (("--steps", "9"), "steps", 9),
        (("--seed", "8"), "seed", 8),
        (("--size", "32x32"), "size", (32, 32)),
        (("--guidance", "0"), "guidance", 0.0),
        (("--step-cache", "0"), "step_cache", 0.0),
        (("--negative-prompt", ""), "negative_prompt", ""),
        (("--option", "shift=1"), "option", {"shift": 1, "cfg_truncation": 0.5}),
        (("--fps", "8"), "fps", 8),
        (("--frames", "9"), "frames", 9),
        (("a dog",), "prompt", "a dog"),
        (("--compute-dtype", "bfloat16"), "compute_dtype", "bfloat16"),
        (("--model", "/other"), "model", "/other"),
        (("-n", "2"), "num_images", 2),
        (("--lora", "x:1"), "lora", {"x": 1}),
    ],
)
def test_flags_replace_what_it_says(given: tuple[str, ...], name: str, value: Any) -> None:
    found = parsed(RECORD, *given)
    assert getattr(found, name) == value
    assert found.repeated.checks_model is (name != "model")


def test_one_picture_of_several_is_made_with_the_others_and_written_alone() -> None:
    found = parsed(replace(RECORD, index=2, num_images=4))
    assert (found.num_images, found.repeated.index) == (4, 2)
    found = parsed(replace(RECORD, index=2, num_images=4), "-n", "1")
    assert (found.num_images, found.repeated.index) == (1, None)


def test_random_embeddings_are_drawn_again() -> None:
    found = parsed(replace(RECORD, prompt=None, negative_prompt=None, random_embeds=5, text_tokens=9))
    assert (found.prompt, found.random_embeds, found.text_tokens) == (None, 5, 9)
    found = parsed(
        replace(RECORD, prompt=None, negative_prompt=None, random_embeds=5, text_tokens=9), "--text-tokens", "7"
    )
    assert (found.random_embeds, found.text_tokens) == (5, 7)
    found = parsed(replace(RECORD, prompt=None, negative_prompt=None, random_embeds=5, text_tokens=9), "a dog")
    assert (found.prompt, found.random_embeds) == ("a dog", None)


EMBEDS = FileRecord(name="cat.safetensors", bytes=3, sample="0" * 64)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": InputsRecord(noise=True)}, "noise of its own"),
        ({"inputs": InputsRecord(sigmas=True)}, "a schedule of its own"),
        ({"variant": "float32_time", "inputs": InputsRecord(conditioning=True)}, "the variant float32_time"),
        ({"prompt": None, "inputs": InputsRecord(conditioning=True)}, "give a prompt, or them by --embeds FILE"),
        ({"prompt": None, "inputs": InputsRecord(embeds=EMBEDS)}, r"cat\.safetensors \(0000000000\); give them by"),
        ({"inputs": InputsRecord(image=1, mask=1)}, "give --image FILE, --mask FILE"),
        ({"inputs": InputsRecord(references=2)}, r"give --reference FILE \(2 of them\)"),
        ({"inputs": InputsRecord(control=1, last_image=1)}, "give --last-image FILE, --control-image FILE"),
        ({"model": ModelRecord(name="gone")}, "the model 'gone' .* no name in .*give it by --model"),
        ({"model": ModelRecord(files={"vae": (FileRecord(name="ae"),)})}, r"the model \(vae ae\)"),
        ({"loras": (LoraRecord(file=EMBEDS, strength=1.0),)}, r"the LoRA cat\.safetensors .* neither in the current"),
    ],
)
def test_what_cannot_be_repeated_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=rf"cat\.png: made .*{says}"):
        parsed(replace(RECORD, **changes))


def test_pictures_that_are_given_again_are_taken() -> None:
    found = parsed(
        replace(RECORD, inputs=InputsRecord(image=1, references=2)), "--image", "i.png", "--reference", "r.png"
    )
    assert found.image == Path("i.png")


def test_loras_are_found_by_name_and_hash(folder: Path) -> None:
    style = folder / "style.safetensors"
    style.write_bytes(b"style")
    schedule = ((0, 0.0), (2, 1.0))
    record = replace(RECORD, loras=(LoraRecord(file=describe(style), strength=schedule),))
    assert parsed(record).lora == {"style.safetensors": schedule}
    style.write_bytes(b"other")
    with pytest.raises(BadRequest, match=r"style\.safetensors is another file; give LoRAs by --lora"):
        parsed(record)
    assert parsed(record, "--lora", "x=0.5").lora == {"x": 0.5}


def test_another_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    parsed(replace(RECORD, version="0.0.1"))
    assert "cat.png: made by xditd 0.0.1" in capsys.readouterr().err


def test_a_model_of_the_same_name_with_other_files_is_refused(folder: Path) -> None:
    weights = folder / "t.safetensors"
    weights.write_bytes(b"one")
    record = replace(RECORD, model=ModelRecord(name="flux", files={"transformer": (describe(weights),)}))
    repeated = parsed(record).repeated

    made = RunSettings(
        model="flux", family="flux1", prompts=("a cat",), negative_prompts=(), width=8, height=8, frames=1, fps=16,
        steps=1, guidance=1.0, num_images=1, seed=7, batch=1, files={"transformer": (str(weights),)},
    )  # fmt: skip
    repeated.check_model(made)
    weights.write_bytes(b"two")
    with pytest.raises(BadRequest, match=r"made with the transformer t\.safetensors .*give --model flux to use it"):
        repeated.check_model(made)
    parsed(record, "--model", "flux").repeated.check_model(made)
    with_scheduler = dataclasses.replace(made, scheduler={"shift": 3.0})
    record = replace(RECORD, model=ModelRecord(name="flux", files=files_of(with_scheduler)))
    with pytest.raises(BadRequest, match=r"made with the scheduler scheduler_config\.json .* has none"):
        parsed(record).repeated.check_model(made)
    parsed(record).repeated.check_model(with_scheduler)


@pytest.mark.parametrize(("family", "kept"), [("wan", None), ("z_image", None), ("qwen_image", "")])
def test_the_empty_negative_prompt_of_a_guided_call_is_its_familys(family: str, kept: str | None) -> None:
    """`--guidance 1` would refuse it, and nobody could leave it out. Qwen-Image guides with a negative prompt alone."""
    record = replace(RECORD, negative_prompt="", model=ModelRecord(name="flux", family=family))
    assert parsed(record).negative_prompt == kept
    assert parsed(record, "--negative-prompt", "a dog").negative_prompt == "a dog"
    assert parsed(replace(record, negative_prompt="a hat")).negative_prompt == "a hat"


def test_a_negative_prompt_is_left_out_with_a_guidance_that_does_not_guide(capsys: pytest.CaptureFixture[str]) -> None:
    record = replace(RECORD, negative_prompt="a hat", model=ModelRecord(name="flux", family="wan"))
    assert parsed(record, "--guidance", "1").negative_prompt is None
    assert "its negative prompt has no effect with --guidance 1, and is left out" in capsys.readouterr().err
    assert parsed(record, "--guidance", "4").negative_prompt == "a hat"


def test_a_lora_that_was_used_twice_is_refused() -> None:
    """Flags name each once: one of the two strengths would be dropped."""
    Path("style.safetensors").write_bytes(b"style")
    file = describe("style.safetensors")
    loras = tuple(LoraRecord(file=file, strength=strength, roles=("transformer",)) for strength in (0.5, 0.3))
    with pytest.raises(
        BadRequest, match=r"cat\.png: made with the LoRA style\.safetensors \(.*\) twice; give LoRAs by"
    ):
        parsed(replace(RECORD, loras=loras))
    assert parsed(replace(RECORD, loras=loras), "--lora", "style.safetensors:1").lora == {"style.safetensors": 1}


def test_a_lora_whose_name_no_file_can_have_is_not_there() -> None:
    file = FileRecord(name="猫" * 200)
    with pytest.raises(BadRequest, match="neither in the current folder nor beside it"):
        parsed(replace(RECORD, loras=(LoraRecord(file=file, strength=0.5),)))


def test_each_lora_is_given_to_the_transformer_that_had_it() -> None:
    for name in ("both", "high", "low", "old"):
        Path(f"{name}.safetensors").write_bytes(name.encode())
    loras = tuple(
        LoraRecord(file=describe(f"{name}.safetensors"), strength=strength, roles=roles)
        for name, strength, roles in (
            ("both", 0.5, ("transformer", "text_encoder")),
            ("high", 1.0, ("transformer",)),
            ("low", ((0, 0.25), (2, 0.5)), ("transformer_2",)),
            ("old", 0.75, ()),
        )
    )
    found = parsed(replace(RECORD, loras=loras))
    assert found.lora == {"both.safetensors": 0.5, "high.safetensors": 1.0, "old.safetensors": 0.75}
    assert found.lora_2 == {"low.safetensors": ((0, 0.25), (2, 0.5))}
    replaced = parsed(replace(RECORD, loras=loras), "--lora-2", "high.safetensors=1")
    assert (replaced.lora, replaced.lora_2) == (None, {"high.safetensors": 1})


def test_the_second_prompt_is_as_the_file_says() -> None:
    assert parsed(replace(RECORD, prompt_2="a hat")).prompt_2 == "a hat"
    assert parsed(replace(RECORD, prompt_2="a hat"), "--prompt-2", "a tie").prompt_2 == "a tie"
    assert parsed(replace(RECORD, prompt_2="a hat"), "a dog").prompt_2 is None
