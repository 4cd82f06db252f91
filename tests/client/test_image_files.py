"""Image files: a name that no image can be written to is refused before an image is generated."""

import pytest

from xditd.client.image_files import check_image_target, encode_image, image_format
from xditd.ipc.errors import BadRequest, OutputFailed

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("out", "has no suffix to tell the format by; use one of .png"),
        (".png", "has no suffix"),
        ("out.", "has no suffix"),
        ("out.pgn", r"\.pgn is no image format; use one of .*did you mean \.png\?"),
        ("out.safetensors", "is no image format"),
        ("out.ico", r"no \.ico file can hold 1024x512 pixels"),
        ("out.xbm", r"no \.xbm file can hold .* in colour"),
    ],
)
def test_names_that_are_no_image_files_are_refused(tmp_path, name, says):
    with pytest.raises(BadRequest, match=says):
        check_image_target(tmp_path / name, 1024, 512)


@pytest.mark.parametrize("name", ["out.png", "OUT.PNG", "out.jpg", "out.jpeg", "out.webp", "out.tiff", "out.bmp"])
def test_usual_formats_hold_the_image(tmp_path, name):
    assert check_image_target(tmp_path / name, 64, 32) == tmp_path / name
    data = encode_image(Image.new("RGB", (64, 32), (1, 2, 3)), image_format(name, 64, 32))
    (tmp_path / name).write_bytes(data)
    with Image.open(tmp_path / name) as found:
        assert found.size == (64, 32)


def test_a_side_beyond_the_format_is_refused():
    assert image_format("a.webp", 16_368, 16) == "WEBP"
    with pytest.raises(BadRequest, match=r"no \.webp file can hold 16x16384"):
        image_format("a.webp", 16, 16_384)


def test_an_encoder_error_becomes_output_failed():
    with pytest.raises(OutputFailed, match=r"image as JPEG: .*save it as \.png"):
        encode_image(Image.new("RGBA", (8, 8)), "JPEG")


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(OutputFailed, match="File name too long"):
        check_image_target(tmp_path / f"{'a' * 300}.png", 16, 16)
