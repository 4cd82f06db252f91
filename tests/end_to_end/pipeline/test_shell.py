"""``xditd generate`` with words: the library's pictures, files that say how they were made, and their repetition."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux1_controlnets
import pipeline_folders as folders
import prompt_pipelines
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

from xditd.client import Client, Control, Pipeline, Unsupported
from xditd.client.cli import control_flags, exits
from xditd.client.cli.main import main
from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.client.metadata.reading import read_record

GIVEN = ["--size", "96x64", "--steps", "2", "--seed", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline of FLUX.1."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    from xditd.gpu_workers.families.flux1 import reference

    parts = tmp_path_factory.mktemp("words")
    prompt_pipelines.flux1(parts)
    pipeline = folders.flux1(
        transformer=reference.transformer_from(flux1_state_dict(3, context_dim=128, pooled_dim=128)),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(parts / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(parts / "tokenizer_2"),
    )
    return folders.saved(pipeline, parts / "flux")


@pytest.fixture
def shell(one_worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the verb on a daemon with one worker, with names of models of this test's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)

    def run(*given: str) -> int:
        return main(["generate", "--runtime-dir", str(one_worker.runtime_dir), "--json", *given])

    return run


def same(left: Path, right: Image.Image) -> bool:
    return ImageChops.difference(Image.open(left), right).getbbox() is None


def test_a_prompt_gives_the_librarys_pictures(
    shell: Callable[..., int], folder: Path, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell("a cat", "--model", str(folder), *GIVEN, "-n", "2", "-o", "cats/") == exits.DONE
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == ["cats/00000.png", "cats/00001.png"]
    with Pipeline.open(folder, client=client) as pipe:
        result = pipe("a cat", num_images=2, width=96, height=64, steps=2, seed=1)
    assert all(same(Path(path), image) for path, image in zip(said["images"], result.images, strict=True))
    found = read_record("cats/00001.png")
    assert (found.prompt, found.seed, found.index, found.num_images) == ("a cat", 1, 1, 2)
    assert (found.model.name, found.model.family, found.negative_prompt) == ("flux", "flux1", None)
    assert {"transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"} == set(found.model.files)
    assert all(each.sample for files in found.model.files.values() for each in files)
    (saved,) = result.save(tmp_path / "library.png", 1)
    assert read_record(saved) == found
    (saved,) = result.save(tmp_path / "plain.png", 1, metadata=False)
    assert b"xditd" not in saved.read_bytes()


def test_what_was_lent_is_named_by_its_part_and_nothing_else_is_said(
    one_worker: Any, folder: Path, tmp_path: Path
) -> None:
    program = "import sys; from xditd.client.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "generate", "a cat", "--model", str(folder), *GIVEN]
    command += ["--runtime-dir", str(one_worker.runtime_dir), "-o", str(tmp_path / "cat.png")]
    quiet = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line.split(":")[0] for line in quiet.stdout.splitlines()[:-1]]
    assert sorted(said) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    # Bars are drawn over themselves; each other line would be of a log.
    assert all(line.startswith("denoising") for line in re.split(r"[\r\n]+", quiet.stderr) if line), quiet.stderr
    verbose = subprocess.run([*command, "-v"], capture_output=True, text=True, timeout=120, check=True)
    assert " INFO " in verbose.stderr


def test_a_picture_is_repeated_by_its_file(
    shell: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "add", "mine", str(folder), "--steps", "2", "--size", "96x64"]) == exits.DONE
    assert shell("a cat", "--model", "mine", "-n", "2", "-o", "cat.png") == exits.DONE
    assert shell("--from", "cat-1.png", "-o", "again.webp", "--json") == exits.DONE
    assert shell("--from", "cat-1.png", "-o", "again.png") == exits.DONE
    assert same(Path("again.png"), Image.open("cat-1.png"))
    assert not same(Path("again.png"), Image.open("cat-0.png"))
    assert not Path("again-0.png").exists()
    assert read_record("again.webp") == read_record("cat-1.png")
    assert shell("--from", "cat-1.png", "a dog", "-o", "dog.png") == exits.DONE
    assert not same(Path("dog.png"), Image.open("cat-1.png"))
    assert (read_record("dog.png").prompt, read_record("dog.png").seed) == ("a dog", read_record("cat-1.png").seed)
    main(["models", "rm", "mine"])
    capsys.readouterr()
    assert shell("--from", "cat-1.png", "-o", "gone.png") == exits.MISUSE
    assert "made with the model 'mine'" in capsys.readouterr().err


def test_a_part_that_no_family_runs_is_refused_with_the_reason(
    shell: Callable[..., int], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "other", copy_function=os.link)
    config = tmp_path / "other" / "vae" / "config.json"
    changed = json.loads(config.read_text()) | {"scaling_factor": 1.5}
    config.unlink()
    config.write_text(json.dumps(changed))
    assert shell("a cat", "--model", str(tmp_path / "other"), *GIVEN) == exits.FAILED
    reason = "no family runs (flux_vae: its configuration differs: scaling_factor=1.5)"
    said = capsys.readouterr()
    assert reason in json.loads(said.out)["error"]["message"]
    assert reason in said.err


@pytest.mark.parametrize(
    ("flag", "changed"), [("transformer", {"axes_dims_rope": [32, 48, 48]}), ("vae", {"scaling_factor": 0.5})]
)
def test_a_folder_of_one_model_is_used_as_its_configuration_says(
    flag: str, changed: dict[str, Any], shell: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = folders.saved(folders.flux1(), tmp_path / "flux")
    given = [part for name in ("transformer", "vae") for part in (f"--{name}", str(saved / name))]
    given += ["--random-embeds", "1", *GIVEN]
    assert shell(*given) == exits.DONE
    config = saved / flag / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    capsys.readouterr()
    assert shell(*given) == exits.FAILED
    (name,) = changed
    said = capsys.readouterr().err
    assert f"{saved / flag}: " in said
    assert f"its configuration differs: {name}=" in said


@pytest.mark.parametrize(
    "given",
    [
        ("--model", "./gone"),
        ("--transformer", "gone"),
        ("--vae", "gone"),
        ("--text-encoder", "gone"),
        ("--tokenizers", "gone"),
        ("--scheduler", "gone"),
        ("--lora", "gone=1"),
        ("--image", "gone"),
        ("--image", "one.png", "--mask", "gone"),
        ("--from", "gone"),
        ("--control", "gone=one.png"),
        ("--control", "one.png=gone"),
    ],
    ids=" ".join,
)
def test_a_file_that_is_not_there_is_misuse(
    shell: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...]
) -> None:
    Image.new("RGB", (96, 64)).save("one.png")
    model = () if given[0] == "--model" else ("--model", str(folder))
    assert shell("a cat", *model, *GIVEN, *given) == exits.MISUSE
    assert re.search("gone: [Nn]o such file or ", capsys.readouterr().err)


@pytest.mark.parametrize("missing", ["transformer", "vae", "embeds", "lora"])
def test_a_single_file_that_is_not_there_is_misuse(
    shell: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    save_file({"prompt_embeds": torch.zeros(1, 3, 128)}, "texts.safetensors")
    files = {name: str(folder / name / "diffusion_pytorch_model.safetensors") for name in ("transformer", "vae")}
    given = {**files, "embeds": "texts.safetensors", missing: "gone=1" if missing == "lora" else "gone"}
    assert shell(*(text for name, path in given.items() for text in (f"--{name}", path)), *GIVEN) == exits.MISUSE
    assert re.search("gone: [Nn]o such file or ", capsys.readouterr().err)


def test_the_length_of_prompts_is_repeated(shell: Callable[..., int], folder: Path) -> None:
    prompt = "a cat in a hat on a sofa beside two dogs under a lamp"
    model = ["--model", str(folder)]
    assert shell(prompt, *model, *GIVEN, "-o", "whole.png") == exits.DONE
    assert shell(prompt, *model, *GIVEN, "--max-sequence-length", "7", "-o", "short.png") == exits.DONE
    assert not same(Path("short.png"), Image.open("whole.png"))
    assert (read_record("whole.png").max_sequence_length, read_record("short.png").max_sequence_length) == (None, 7)
    assert shell("--from", "short.png", *model, "-o", "again.png") == exits.DONE
    assert same(Path("again.png"), Image.open("short.png"))
    assert read_record("again.png") == read_record("short.png")
    assert shell("--from", "short.png", *model, "--max-sequence-length", "512", "-o", "other.png") == exits.DONE
    assert same(Path("other.png"), Image.open("whole.png"))


def test_several_videos_are_numbered_folders_or_files(
    shell: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, parts = folders.wan(), tmp_path / "parts"
    prompt_pipelines.save_texts("wan", parts)
    pipeline.register_modules(**prompt_pipelines.read_texts("wan", parts))
    model = ["--model", str(folders.saved(pipeline, tmp_path / "wan"))]
    given = [*model, *GIVEN, "--frames", "5", "-n", "2"]
    for first in (0, 2):  # from the next number on
        assert shell("a cat", *given, "-o", "films/") == exits.DONE
        said = json.loads(capsys.readouterr().out)
        assert said["videos"] == [f"films/{first:05}", f"films/{first + 1:05}"]
    for film in sorted(Path("films").iterdir()):
        assert sorted(each.name for each in film.iterdir()) == [f"frame_{number:05}.png" for number in range(5)]
    found = read_record("films/00001/frame_00002.png")
    assert (found.index, found.num_images, found.frames) == (1, 2, 5)
    assert shell("--from", "films/00001/frame_00002.png", *model, "-o", "again/") == exits.DONE
    assert same(Path("again/frame_00002.png"), Image.open("films/00001/frame_00002.png"))
    assert not same(Path("again/frame_00002.png"), Image.open("films/00000/frame_00002.png"))
    capsys.readouterr()
    assert shell("a cat", *given, "-o", "cat.mp4") == exits.DONE
    assert json.loads(capsys.readouterr().out)["videos"] == ["cat-0.mp4", "cat-1.mp4"]
    assert read_record("cat-1.mp4").index == 1


def test_one_of_several_pictures_from_embeddings_is_repeated(shell: Callable[..., int], folder: Path) -> None:
    texts = {"prompt_embeds": folders.rows(1, 2, 15, 128), "pooled_prompt_embeds": folders.rows(2, 2, 128)}
    save_file(texts, "two.safetensors")
    save_file({name: each[:1].clone() for name, each in texts.items()}, "one.safetensors")
    model = ["--model", str(folder)]
    for embeds, count in (("two", 1), ("one", 2)):  # two pictures each
        given = ["--embeds", f"{embeds}.safetensors"]
        assert shell(*model, *GIVEN, *given, "-n", str(count), "-o", f"{embeds}.png") == exits.DONE
        assert read_record(f"{embeds}-1.png").num_images == 2
        assert shell("--from", f"{embeds}-1.png", *model, *given, "-o", f"{embeds}-again.png") == exits.DONE
        assert same(Path(f"{embeds}-again.png"), Image.open(f"{embeds}-1.png"))
        assert not same(Path(f"{embeds}-again.png"), Image.open(f"{embeds}-0.png"))
        assert read_record(f"{embeds}-again.png") == read_record(f"{embeds}-1.png")
    assert shell("--random-embeds", "3", *model, *GIVEN, "-n", "2", "-o", "random.png") == exits.DONE
    assert shell("--from", "random-1.png", *model, "-o", "random-again.png") == exits.DONE
    assert same(Path("random-again.png"), Image.open("random-1.png"))


def test_the_files_of_a_model_are_not_written_to(
    shell: Callable[..., int], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    encoder = tmp_path / "encoder.safetensors"
    shutil.copy(folder / "text_encoder" / "model.safetensors", encoder)
    model = ["--model", str(folder)]
    for path, more in ((weights, []), (encoder, ["--text-encoder", str(encoder)])):
        before = path.read_bytes()
        given = [*model, *more, *GIVEN, "--save-latents", str(path), "-o", "cat.png"]
        assert shell("a cat", *given) == exits.MISUSE
        assert f"output file {path}: is also read here" in capsys.readouterr().err
        assert path.read_bytes() == before


def test_an_error_after_the_pictures_is_the_only_document(
    shell: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Pipeline.close

    def interrupted(pipe: Pipeline) -> None:
        close(pipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "close", interrupted)
    assert shell("a cat", "--model", str(folder), *GIVEN, "-o", "cat.png") == exits.INTERRUPTED
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "cancelled"


def test_a_picture_of_a_model_of_videos_is_repeated_as_one(shell: Callable[..., int], tmp_path: Path) -> None:
    pipeline, parts = folders.wan(), tmp_path / "parts"
    prompt_pipelines.save_texts("wan", parts)
    pipeline.register_modules(**prompt_pipelines.read_texts("wan", parts))
    model = ["--model", str(folders.saved(pipeline, tmp_path / "wan"))]
    assert shell("a cat", *model, *GIVEN, "--frames", "1", "--guidance", "3", "-o", "cat.png") == exits.DONE
    assert read_record("cat.png").negative_prompt == ""
    assert shell("--from", "cat.png", *model, "-o", "again.png") == exits.DONE
    assert same(Path("again.png"), Image.open("cat.png"))
    assert shell("--from", "cat.png", *model, "--guidance", "1", "-o", "plain.png") == exits.DONE
    assert not same(Path("plain.png"), Image.open("cat.png"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a cat", "--negative-prompt", "a dog"], "negative_prompt: it has no classifier-free guidance"),
        (["a cat", "--frames", "5"], "frames: it makes pictures"),
        (
            ["a cat", "--control-image", "c.png"],
            "control: flux1 (flux) takes ControlNets",
        ),
        (["a cat", "--option", "shift=3"], "options: it has no options"),
        (["a cat", "--fps", "10"], "--fps 10: is of a video, and flux makes a picture"),
        (["a cat", "--lora", "gone.safetensors:1"], "gone.safetensors"),
    ],
)
def test_what_the_model_does_not_take_is_refused_and_nothing_written(
    shell: Callable[..., int], folder: Path, given: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell(*given, "--model", str(folder), *GIVEN) in (exits.MISUSE, exits.FAILED)
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert not Path("out.png").exists()


def test_a_model_with_a_controlnet(
    shell: Callable[..., int], folder: Path, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = flux1_controlnets.comfyui_state(5, modes=flux1_controlnets.MODES, context_dim=128, pooled_dim=128)
    union, edges = tmp_path / "union.safetensors", tmp_path / "edges.png"
    save_file(flux1_controlnets.diffusers_state(state), union)
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(edges)
    flag = f"{union}={edges}@0.6:end=0.9:mode=2"
    assert shell("a cat", "--model", str(folder), *GIVEN, "--control", flag, "-o", "cat.png") == exits.DONE
    capsys.readouterr()
    pixels = control_flags.read_sized(
        argparse.Namespace(control=control_flags.parse(flag), vae="its own", size=(96, 64)), (96, 64)
    )
    with Pipeline.open(folder, client=client) as pipe, client.lend(union) as lent:
        given = {"width": 96, "height": 64, "steps": 2, "seed": 1}
        control = Control(lent, pixels[0], scale=0.6, end=0.9, mode=2)
        assert same(Path("cat.png"), pipe("a cat", control=control, **given).images[0])
        assert not same(Path("cat.png"), pipe("a cat", **given).images[0])
    found = read_record("cat.png")
    assert (found.prompt, found.inputs.control) == ("a cat", 1)
    assert shell("--from", "cat.png", "--model", str(folder), "-o", "again.png") == exits.MISUSE
    assert "--control-image FILE (or --control, with its ControlNet)" in capsys.readouterr().err
    assert shell("--from", "cat.png", "--model", str(folder), "--control", flag, "-o", "again.png") == exits.DONE
    assert same(Path("again.png"), Image.open("cat.png"))


def test_a_lora_of_an_encoder_that_takes_none_is_refused(
    shell: Callable[..., int], folder: Path, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the transformer alone it would be another picture than the one that was trained for."""
    rank = {"A": (4, 256), "B": (256, 4)}
    layers = [f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    layers += ["text_encoder_2.model.layers.0.self_attn.q_proj"]  # of a language model
    path = tmp_path / "style.safetensors"
    save_file(
        {f"{layer}.lora_{end}.weight": torch.ones(shape) for layer in layers for end, shape in rank.items()}, path
    )
    says = (
        "style.safetensors: its layers of a text encoder, text_encoder_2.model.layers.0.self_attn.q_proj.lora_A.weight"
    )
    assert shell("a cat", "--model", str(folder), *GIVEN, "--lora", f"{path}:1") == exits.FAILED
    assert says in capsys.readouterr().err
    with Pipeline.open(folder, client=client) as pipe, pytest.raises(Unsupported, match=says):
        pipe("a cat", steps=1, width=96, height=64, loras=[(path, 1.0)])
    assert not Path("out.png").exists()
