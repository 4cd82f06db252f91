"""Convert images to Pillow's and encode them to files: the suffix names the format, which is checked beforehand."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, Final

from xditd.client.output_files import check_target, output_path
from xditd.ipc.errors import BadRequest, OutputFailed
from xditd.ipc.suggestions import did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image

_SUGGESTED: Final = (".png", ".jpg", ".webp", ".tiff", ".bmp")
_TRIAL_PIXELS: Final = 16
_ENCODER_ERRORS: Final = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, SystemError)
"""What Pillow's encoders raise for an image that the format cannot hold; its documentation names no class."""


def check_image_target(path: str | os.PathLike[str], width: int, height: int) -> Path:
    """Check, before an image is generated, that it can be written to a path in the format of its suffix.

    Returns the path with ``~`` expanded.

    Raises:
        BadRequest: no suffix, an unknown one, a format that cannot hold an image of this size, or not a regular file.
        OutputFailed: the path cannot be written, or the disk has no room for the uncompressed image.
    """
    image_format(path, width, height)
    return check_target(path, 3 * width * height)


def image_format(path: str | os.PathLike[str], width: int, height: int) -> str:
    """Return the name of Pillow's format for a path, checked to hold an image of this size.

    Raises:
        BadRequest: there is no such format.
    """
    from PIL import Image

    target = output_path(path)
    suffix = target.suffix.lower()
    remedy = f"use one of {', '.join(_SUGGESTED)}"
    if not target.name or os.path.isdir(target):
        raise BadRequest(f"image file {target}: is a folder; name a file in it, such as {target / 'out.png'}")
    if not suffix:
        raise BadRequest(f"image file {target}: has no suffix to tell the format by; {remedy}, such as {target}.png")
    formats = Image.registered_extensions()
    name = formats.get(suffix)
    if name is None:
        hint = did_you_mean(suffix, _SUGGESTED)
        raise BadRequest(f"image file {target}: {suffix} is no image format; {remedy}{hint}")
    # Pillow also lists formats that it only reads, or that change the size (icons) or the colours, so encode a trial
    # image. It is as long as the image's longer side, because the largest size depends on the format.
    trial = Image.new("RGB", (max(width, height), _TRIAL_PIXELS))
    try:
        with Image.open(io.BytesIO(_encode(trial, name))) as found:
            is_kept = found.size == trial.size
    except _ENCODER_ERRORS:
        is_kept = False
    if not is_kept:
        raise BadRequest(f"image file {target}: no {suffix} file can hold {width}x{height} pixels in colour; {remedy}")
    return name


def encode_image(image: Image.Image, format_name: str, record: str | None = None) -> bytes:
    """Encode an image. ``record`` is the JSON text that a PNG, a JPEG or a WebP gets; other formats hold none.

    Raises:
        BadRequest: the record is too long for a JPEG.
        OutputFailed: the encoder failed.
    """
    more = {} if record is None else _holding(record, format_name)
    try:
        return _encode(image, format_name, **more)
    except _ENCODER_ERRORS as error:
        raise OutputFailed(f"image as {format_name}: {error}; save it as .png") from error


def _holding(record: str, format_name: str) -> dict[str, Any]:
    """Return the arguments with which Pillow's encoder of a format writes a record."""
    from xditd.client.metadata.containers import exif, png_info

    if format_name == "PNG":
        return {"pnginfo": png_info(record)}
    if format_name in ("JPEG", "WEBP"):
        return {"exif": exif(record, is_jpeg=format_name == "JPEG")}
    return {}


def _encode(image: Image.Image, format_name: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_name, **more)
    return buffer.getvalue()


def levels_of(image: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1], of any shape, as levels from 0 to 255 on the CPU. Values outside are clamped.

    They are moved to [0, 1] in their own dtype, and rounded from float32, as diffusers does.

    Source: diffusers, ``VaeImageProcessor.postprocess``; tests compare the levels.
    """
    import torch

    return ((image.detach().cpu() * 0.5 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)


def image_to_pil(image: torch.Tensor) -> Image.Image:
    """Convert an image (3, height, width) in [-1, 1] to 8-bit RGB. Values outside are clamped."""
    import ctypes

    from PIL import Image

    pixels = levels_of(image).permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    # Without numpy, on which the client does not depend.
    return Image.frombytes("RGB", (width, height), ctypes.string_at(pixels.data_ptr(), pixels.nbytes))
