"""Results: a short representation, and saving to files."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from xditd.client import GenerationResult, TextEncoding  # noqa: E402
from xditd.client.pipeline.results import PipelineResult  # noqa: E402
from xditd.client.pipeline.settings import RunSettings  # noqa: E402
from xditd.ipc.errors import BadRequest, OutputFailed  # noqa: E402

SIZES = {"width": 16, "height": 16, "frames": 1, "fps": 16, "steps": 2, "guidance": 1.0, "num_images": 1, "seed": 7}
RUN = RunSettings(model="model", family="flux1", prompts=("cat",), negative_prompts=(), batch=1, **SIZES)


def result(image=True):
    latents = torch.zeros(1, 16, 2, 2, dtype=torch.bfloat16)
    return GenerationResult(latents, torch.zeros(1, 3, 16, 16) if image else None, {"denoise": 1.0}, 7)


def test_results_are_shown_in_one_line_without_values():
    assert repr(result()) == (
        "<GenerationResult image (1, 3, 16, 16) float32 on cpu, latents (1, 16, 2, 2) bfloat16 on cpu, seed 7>"
    )
    assert "no image" in repr(result(image=False))
    encoding = TextEncoding(torch.zeros(1, 77, 768), torch.zeros(1, 768))
    assert repr(encoding) == "<TextEncoding hidden_states (1, 77, 768) float32 on cpu, pooled (1, 768) float32 on cpu>"
    assert "not pooled" in repr(TextEncoding(torch.zeros(1, 77, 768), None))


def test_a_missing_image_is_an_error():
    with pytest.raises(BadRequest, match="index 1: the batch has 1 images"):
        result().to_pil(1)


@pytest.mark.parametrize("image", [(1, 3, 16, 16), (1, 3, 5, 16, 16)], ids=["image", "video"])
@pytest.mark.parametrize(
    ("path", "refusal"),
    [
        (5, "path: 5 is of type int; name the output file by a text or a pathlib.Path"),
        (None, "path: None is of type NoneType; name the output file"),
        (b"out.png", "path: b'out.png' is of type bytes; name the output file"),
        ("", "path: '' names no file; name the output file, such as 'out.png'"),
    ],
)
def test_what_is_no_path_is_refused(image, path, refusal):
    made = dataclasses.replace(result(), image=torch.zeros(image))
    with pytest.raises(BadRequest, match=refusal):
        made.save(path)
    with pytest.raises(BadRequest, match=refusal):
        PipelineResult(made, RUN).save(path)


def test_numbers_and_folders_are_refused_by_a_pipelines_result():
    made = PipelineResult(result(), RUN)
    with pytest.raises(BadRequest, match="index: 'a' is not a whole number; the batch has 1"):
        made.save("out.png", "a")
    with pytest.raises(BadRequest, match="index 3: the batch has 1"):
        made.record(3)
    with pytest.raises(BadRequest, match=r"path: out has no suffix; give a picture, out\.png, or a folder, out/"):
        made.save("out")


def test_frames_a_second_of_pictures_are_refused():
    with pytest.raises(BadRequest, match="fps: 24 is of a video, and these are pictures"):
        PipelineResult(result(), RUN).save("out.png", fps=24)


def made_of(count: int, frames: int = 1) -> PipelineResult:
    shape = (count, 3, frames, 8, 8) if frames > 1 else (count, 3, 8, 8)
    several = dataclasses.replace(result(), image=torch.zeros(shape), latents=torch.zeros(count, 4, 1, 1))
    return PipelineResult(several, dataclasses.replace(RUN, frames=frames, num_images=count))


@pytest.mark.parametrize(
    ("count", "frames", "path", "names"),
    [
        (2, 1, "two/", ["two/00000.png", "two/00001.png"]),
        (1, 1, "two/", ["two/00000.png"]),
        (2, 1, "there", ["there/00008.png", "there/00009.png"]),
        (2, 1, "two.png", ["two-0.png", "two-1.png"]),
        (2, 5, "two/", ["two/00000/frame_00004.png", "two/00001/frame_00004.png"]),
        (1, 5, "two/", ["two/frame_00004.png"]),
        (2, 5, "two", ["two-0/frame_00004.png", "two-1/frame_00004.png"]),
    ],
)
def test_several_pictures_and_videos_in_a_folder(tmp_path, monkeypatch, count, frames, path, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "00007.png").touch()
    saved = made_of(count, frames).save(path)
    assert len(saved) == count
    assert all((tmp_path / name).is_file() for name in names)
    found = {str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*.png")} - {"there/00007.png"}
    assert found >= set(names)
    assert len(found) == count * frames


def test_a_folder_is_no_image_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shots.png").mkdir()
    with pytest.raises(BadRequest, match=r"shots\.png: is a folder; name a file in it, such as .*shots\.png/out\.png"):
        result().save(tmp_path / "shots.png")
    with pytest.raises(BadRequest, match=r"image file \.: is a folder; name a file in it, such as out\.png"):
        result().save(".")
    assert [each.name for each in tmp_path.iterdir()] == ["shots.png"]


def test_saving_can_be_repeated_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = result()
    with pytest.raises(BadRequest, match="has no suffix"):
        made.save(tmp_path / "out")
    with pytest.raises(OutputFailed, match="choose another place"):
        made.save("/sys/out.png")
    assert made.save("~/new/out.png") == tmp_path / "new" / "out.png"
    assert (tmp_path / "new" / "out.png").is_file()
