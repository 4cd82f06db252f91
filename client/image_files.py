"""Images as files: which format a file name means, whether it can be written, and its bytes."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Final

from xditd.client.output_files import check_target
from xditd.ipc.addresses import user_path
from xditd.ipc.errors import BadRequest, OutputFailed
from xditd.ipc.suggestions import did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

_SUGGESTED: Final = (".png", ".jpg", ".webp", ".tiff", ".bmp")
_TRIAL_PIXELS: Final = 16
_ENCODER_ERRORS: Final = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, SystemError)
"""What encoders of Pillow raise for an image that their format cannot hold; it promises no class."""


def check_image_target(path: str | os.PathLike[str], width: int, height: int) -> Path:
    """Look, before an image is made, whether it can be written to a path in the format that its suffix names.

    Returns the path with ``~`` replaced.

    Raises:
        BadRequest: no suffix, one of no image format, a format that cannot hold an image of this size, or no file.
        OutputFailed: the place may not be written, or has no room for the image uncompressed.
    """
    image_format(path, width, height)
    return check_target(path, 3 * width * height)


def image_format(path: str | os.PathLike[str], width: int, height: int) -> str:
    """Name Pillow's format for a path, which can hold an image of this size.

    Raises:
        BadRequest: there is none.
    """
    from PIL import Image

    target = user_path(path)
    suffix = target.suffix.lower()
    remedy = f"use one of {', '.join(_SUGGESTED)}"
    if not suffix:
        raise BadRequest(f"image file {target}: has no suffix to tell the format by; {remedy}, such as {target}.png")
    formats = Image.registered_extensions()
    name = formats.get(suffix)
    if name is None:
        hint = did_you_mean(suffix, _SUGGESTED)
        raise BadRequest(f"image file {target}: {suffix} is no image format; {remedy}{hint}")
    # Pillow lists formats that it only reads, and writes some in another size (icons) or not in colour: try it. As
    # long as the image's longer side, since formats differ in the largest that they hold.
    trial = Image.new("RGB", (max(width, height), _TRIAL_PIXELS))
    try:
        with Image.open(io.BytesIO(_encoded(trial, name))) as found:
            is_kept = found.size == trial.size
    except _ENCODER_ERRORS:
        is_kept = False
    if not is_kept:
        raise BadRequest(f"image file {target}: no {suffix} file can hold {width}x{height} pixels in colour; {remedy}")
    return name


def encode_image(image: Image.Image, format_name: str) -> bytes:
    """Encode an image.

    Raises:
        OutputFailed: the encoder failed.
    """
    try:
        return _encoded(image, format_name)
    except _ENCODER_ERRORS as error:
        raise OutputFailed(f"image as {format_name}: {error}; save it as .png") from error


def _encoded(image: Image.Image, format_name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_name)
    return buffer.getvalue()
