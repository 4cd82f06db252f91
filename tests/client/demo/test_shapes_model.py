"""The demo with shapes: what its sentences ask for, and how pictures are compared with them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from shapes.draw import draw, encode
from shapes.scenes import Scene, Thing, is_held_out

from xditd.client.demo import shapes_model
from xditd.client.demo.journey import DemoOptions, DemoRun
from xditd.client.demo.page import write_page
from xditd.client.demo.report import Picture, Report
from xditd.ipc.errors import BadCheckpoint, OutputFailed

SHAPES = Path(__file__).parents[3] / "models" / "shapes"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 15761776\n"
SENTENCE = shapes_model.SENTENCES[0]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """What the first sentence asks for."""
    heart = Thing("heart", "purple", "large", 3, 0.25, 0.5, 0.15)
    star = Thing("star", "blue", "small", 5, 0.8, 0.5, 0.09)
    (image,) = draw(encode([Scene((heart, star), "plain", "light green")]))
    pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(tmp_path / "demo.png")
    return tmp_path / "demo.png"


def test_a_picture_file_is_read_back(picture: Path) -> None:
    found = shapes_model.read_pictures([picture])
    assert found is not None
    (read,) = found
    assert [(each["form"], each["size"], each["cell"]) for each in read["things"]] == [
        ("heart", "large", 3),
        ("star", "small", 5),
    ]
    assert (read["pattern"], read["background"]) == ("plain", "light green")
    assert shapes_model.differs(SENTENCE, read) == ""
    read["things"][1]["colour"] = "red"
    assert "shows purple heart, red star" in shapes_model.differs(SENTENCE, read)
    read["things"] = []
    assert shapes_model.differs(SENTENCE, read).endswith("shows nothing")


def test_a_picture_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "demo.png").write_bytes(b"no picture")
    with pytest.raises(OutputFailed, match=r"demo\.png: cannot be read back"):
        shapes_model.read_pictures([tmp_path / "demo.png"])


def test_sentences_name_combinations_that_training_never_saw() -> None:
    for sentence in shapes_model.SENTENCES:
        assert any(is_held_out(form, colour) for colour, form in sentence.shows)


def test_sigmas_are_those_of_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - step / 8 for step in range(8)], mu=0.5)
    assert torch.allclose(torch.tensor(shapes_model.shifted_sigmas(8)), scheduler.sigmas[:-1], atol=1e-6)


def test_a_picture_that_differs_fails_the_demo(picture: Path) -> None:
    report = Report(image=str(picture), parity=0.0, is_lent_once=True)
    report.pictures = [Picture(str(picture), SENTENCE.text, {"things": []}, "")]
    assert report.faults() == []
    assert SENTENCE.text in report.summary()
    assert "read: nothing" in report.summary()
    report.pictures = [dataclasses.replace(report.pictures[0], fault="'a heart' shows nothing")]
    assert report.faults() == ["a picture differs from its sentence: 'a heart' shows nothing"]
    assert report.as_json()["pictures"][0]["fault"]  # type: ignore[index]


def test_a_folder_without_weights_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_model, "_checkout", lambda: tmp_path)
    (tmp_path / "models" / "shapes" / "transformer").mkdir(parents=True)
    assert shapes_model.find_shapes() is None
    assert shapes_model.read_pictures([]) is None
    (tmp_path / "models" / "shapes" / "transformer" / "diffusion_pytorch_model.safetensors").touch()
    assert shapes_model.find_shapes() == tmp_path / "models" / "shapes"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5_000])


def _write_pointer(path: Path) -> None:
    path.write_bytes(POINTER)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokenizer", shutil.rmtree, r"tokenizer/vocab\.json: is missing"),
        ("tokenizer_2/tokenizer.json", Path.unlink, r"tokenizer_2/tokenizer\.json: is missing"),
        ("tokenizer_2/tokenizer.json", _cut, r"tokenizer_2/tokenizer\.json: cannot be read: "),
        ("text_encoder/config.json", _empty, r"text_encoder/config\.json: cannot be read: "),
        ("text_encoder_2/model.safetensors", _write_pointer, r"text_encoder_2/model\.safetensors: .*Git LFS pointer"),
        ("transformer/diffusion_pytorch_model.safetensors", _cut, r"transformer/diffusion.*truncated"),
        ("transformer/diffusion_pytorch_model.safetensors", Path.unlink, r"transformer/diffusion.*: is missing"),
        ("vae/diffusion_pytorch_model.safetensors", Path.unlink, r"vae/diffusion.*: is missing"),
    ],
)
def test_a_damaged_folder_ends_the_demo_before_its_daemon(
    name: str, damage: Callable[[Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes_model, "_checkout", lambda: tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(SHAPES, tmp_path / "models" / "shapes")
    shapes_model.check_shapes(folder)
    damage(folder / name)
    demo = DemoRun(DemoOptions(tmp_path / "out", 2, "cpu", (256, 256), 8, keep=False), None)
    with pytest.raises(BadCheckpoint, match=message) as found:
        demo.run()
    assert f"git -C {tmp_path} checkout -- models/shapes" in found.value.detail
    assert os.listdir(tmp_path) == ["models"]


def test_other_errors_keep_their_words(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"^/else: wrong$"), shapes_model.of_checkout(tmp_path):
        raise BadCheckpoint("/else: wrong")


def test_the_page_shows_pictures_with_their_sentences(picture: Path, tmp_path: Path) -> None:
    read = {"things": [{"colour": "red", "form": ""}]}
    write_page(tmp_path / "demo.html", [Picture(str(picture), "a <heart> & 一颗星", read, "")])
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert '<img src="demo.png" alt="a &lt;heart&gt; &amp; 一颗星">' in page
    assert "<figcaption>a &lt;heart&gt; &amp; 一颗星<br><small>read: red something</small>" in page
