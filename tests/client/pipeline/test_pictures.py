"""Pictures of calls: what is read, and what is refused by the name of its argument."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from xditd.client.pipeline import pictures
from xditd.ipc.errors import BadRequest


def png(picture: Image.Image, **more: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **more)
    return buffer.getvalue()


def ramp(dtype: Any, most: float) -> Image.Image:
    return Image.fromarray(numpy.linspace(0, most, 96).reshape(8, 12).astype(dtype))


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (ramp(numpy.uint16, 65535), "mode I;16, which have no 256 levels to convert; save it with 8 bits"),
        (ramp(numpy.int32, 65535), "mode I, which have no 256 levels"),
        (ramp(numpy.float32, 1), "mode F, which have no 256 levels"),
        (Image.new("LA", (8, 8)).convert("La"), "mode La"),
        (Image.new("RGB", (0, 4)), "0x4 pixels"),
    ],
)
def test_pictures_that_pillow_would_cut_are_refused(picture: Image.Image, says: str, tmp_path: Path) -> None:
    """Converted to RGB, a depth map of 16 bits is white but for its darkest shades."""
    with pytest.raises(BadRequest, match=f"control: .*{says}"):
        pictures.opened(picture, "control")
    if picture.mode == "I;16":
        (tmp_path / "depth.png").write_bytes(png(picture))
        with pytest.raises(BadRequest, match=rf"control: .*depth\.png: .*{says}"):
            pictures.opened(tmp_path / "depth.png", "control")


def test_a_mask_that_has_no_shades_of_grey_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"mask: .*mode=LAB.*save it in shades of grey"):
        pictures.mask_of(Image.new("LAB", (8, 8)), 16, 16)


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    whole = png(Image.radial_gradient("L").resize((33, 21)))
    begin = whole.index(b"IDAT") - 4
    shorter = whole[:begin] + (9).to_bytes(4, "big") + whole[begin + 4 :]
    dds = io.BytesIO()
    Image.new("RGB", (8, 8)).save(dds, "DDS")
    of_other_flags = bytearray(dds.getvalue())
    of_other_flags[80:84] = (1 << 14).to_bytes(4, "little")
    for number, data in enumerate((whole[:60], shorter, bytes(of_other_flags), b"")):
        path = tmp_path / f"{number}.png"
        path.write_bytes(data)
        with pytest.raises(BadRequest, match=rf"image: .*{number}\.png: no picture that can be read"):
            pictures.opened(path, "image")
    for name, why in (
        ("3.png", "Pillow finds no format in it that it knows; use a PNG or JPEG file"),
        ("", "Is a directory"),
    ):
        with pytest.raises(BadRequest, match=rf"image: {tmp_path / name}: no picture that can be read: {why}$"):
            pictures.opened(tmp_path / name, "image")
    with Image.open(tmp_path / "0.png") as lazy, pytest.raises(BadRequest, match=r"image: .*no picture that can be"):
        pictures.opened(lazy, "image")
    with pytest.raises(BadRequest, match="no such file or folder"):
        pictures.opened(tmp_path / ("a" * 300), "image")


@pytest.mark.parametrize("tensor", [torch.zeros(3, 4, 4, device="meta"), torch.zeros(3, 4, 4).to_sparse()])
def test_tensors_without_dense_values_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(BadRequest, match="image: a tensor without values, or not a dense one"):
        pictures.opened(tensor, "image")
