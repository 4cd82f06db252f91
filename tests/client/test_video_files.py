"""Results of videos: frames, an .mp4 by PyAV, and a folder of PNG files without it."""

import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from sample_records import WHOLE  # noqa: E402

from xditd.client import GenerationResult  # noqa: E402
from xditd.ipc.errors import BadRequest, OutputFailed  # noqa: E402


@pytest.fixture
def result():
    """A white square that moves over black, in two videos of five frames."""
    video = torch.full((2, 3, 5, 32, 48), -1.0)
    for number in range(5):
        video[1, :, number, 8:24, 4 * number : 4 * number + 16] = 1.0
    return GenerationResult(torch.zeros(2, 16, 2, 4, 6), video, {}, 7)


def test_frames_are_images_in_order(result):
    frames = result.to_frames(1)
    assert [each.size for each in frames] == [(48, 32)] * 5
    assert [each.getbbox() for each in frames] == [(4 * i, 8, 4 * i + 16, 24) for i in range(5)]
    assert all(each.getbbox() is None for each in result.to_frames())
    with pytest.raises(BadRequest, match=r"a video of 5 frames; take its frames by to_frames\(\)"):
        result.to_pil()
    with pytest.raises(BadRequest, match="index 2: the batch has 2 images"):
        result.to_frames(2)


def test_an_image_is_one_frame():
    (frame,) = GenerationResult(torch.zeros(1), torch.ones(1, 3, 8, 16), {}, 7).to_frames()
    assert frame.size == (16, 8)


def test_without_a_suffix_frames_are_files_of_a_folder(result, tmp_path):
    from PIL import Image

    assert result.save(tmp_path / "new" / "cat", 1) == tmp_path / "new" / "cat"
    files = sorted((tmp_path / "new" / "cat").iterdir())
    assert [each.name for each in files] == [f"frame_0000{i}.png" for i in range(5)]
    with Image.open(files[3]) as frame:
        assert frame.getbbox() == (12, 8, 28, 24)


def test_a_video_is_written_with_its_frames_and_their_rate(result, tmp_path):
    av = pytest.importorskip("av")
    path = result.save(tmp_path / "cat.mp4", 1, fps=24)
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 24)
        frames = [each.to_image() for each in container.decode(stream)]
    assert len(frames) == 5
    for number, frame in enumerate(frames):
        bright = frame.convert("L").point(lambda value: 255 if value > 128 else 0).getbbox()
        assert all(abs(a - b) <= 1 for a, b in zip(bright, (4 * number, 8, 4 * number + 16, 24), strict=True))


@pytest.mark.parametrize(
    ("name", "fps", "says"),
    [
        ("cat.png", 16, r"\.png is not written; use \.mp4, or a path without a suffix"),
        ("cat.mp4", 0, "fps: 0 is not a whole number from 1 to 1000"),
        ("cat.mp4", 2.5, r"fps: 2\.5 is not a whole number"),
    ],
)
def test_what_cannot_be_written_is_refused(result, tmp_path, name, fps, says):
    with pytest.raises(BadRequest, match=says):
        result.save(tmp_path / name, fps=fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, 2.5, "x", True, 2**70])
def test_fps_is_named_also_with_a_record(result, tmp_path, fps):
    with pytest.raises(BadRequest, match=r"^fps: .* is not a whole number from 1 to 1000"):
        replace(result, record=WHOLE).save(tmp_path / "cat.mp4", fps=fps)


@pytest.mark.parametrize("index", ["0", None, 0.0, True])
def test_an_index_is_a_whole_number(result, tmp_path, index):
    for use in (result.to_frames, lambda index: replace(result, record=WHOLE).save(tmp_path / "cat.mp4", index)):
        with pytest.raises(BadRequest, match=r"^index: .* is not a whole number; the batch has \d"):
            use(index)
    assert not list(tmp_path.iterdir())


def test_odd_sides_are_refused(tmp_path):
    odd = GenerationResult(torch.zeros(1), torch.zeros(1, 3, 1, 33, 48), {}, 7)
    with pytest.raises(BadRequest, match="48x33 pixels are not even; save it to a folder"):
        odd.save(tmp_path / "cat.mp4")


def test_without_pyav_the_remedy_is_named(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadRequest, match=r"PyAV is not installed; pip install 'xditd\[video\]'"):
        result.save(tmp_path / "cat.mp4")
    assert result.save(tmp_path / "cat").is_dir()


def test_an_encoder_s_error_is_typed(result, tmp_path, monkeypatch):
    av = pytest.importorskip("av")

    def fails(*_, **__):
        raise av.error.FFmpegError(22, "no such encoder")

    monkeypatch.setattr(av, "open", fails)
    with pytest.raises(OutputFailed, match="no such encoder; save it to a path without a suffix"):
        result.save(tmp_path / "cat.mp4")


def test_a_video_of_one_frame_is_an_image_too(tmp_path):
    from PIL import Image

    one = GenerationResult(torch.zeros(1), torch.ones(1, 3, 1, 8, 16), {}, 7)
    assert not one.is_video
    assert one.to_pil().size == (16, 8)
    with Image.open(one.save(tmp_path / "cat.png")) as found:
        assert found.size == (16, 8)
    assert (one.save(tmp_path / "cat") / "frame_00000.png").is_file()


def test_a_folder_with_later_frames_of_another_video_is_refused(result, tmp_path):
    longer = GenerationResult(torch.zeros(1), torch.zeros(1, 3, 9, 32, 48), {}, 7)
    longer.save(tmp_path / "cat")
    with pytest.raises(BadRequest, match=r"cat: has frame_00005\.png of a video of more than 5 frames; empty it"):
        result.save(tmp_path / "cat")
    assert longer.save(tmp_path / "cat") == tmp_path / "cat"
