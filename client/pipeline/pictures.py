"""Pictures and masks in: from paths, Pillow, numpy and torch to the tensors of jobs, resized as diffusers resizes them.

Source: diffusers, ``VaeImageProcessor.preprocess``; tests compare the bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc.addresses import check_is_there, user_path
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    import torch
    from PIL import Image

Picture = Any
"""A path, a ``PIL.Image``, an array (height, width, 3) of uint8 or of floats in [0, 1], or a tensor (3, height, width)
of floats in [0, 1]."""

_NO_LEVELS: Final = ("I", "F", "La")
_UNREADABLE: Final = (OSError, ValueError, TypeError, ArithmeticError, LookupError, SyntaxError, RuntimeError, EOFError)
"""What Pillow's decoders raise for files that are malformed or of a kind that they do not know."""


def opened(value: Picture, name: str) -> Image.Image:
    """Return a picture as Pillow's, decoded, in whatever mode it has.

    Raises:
        BadRequest: it cannot be read, has no 8 bits a channel, or is no picture; ``name`` is that of the argument.
    """
    from PIL import Image, ImageOps

    if isinstance(value, str | os.PathLike):
        path = user_path(value)
        check_is_there(path, name)
        try:
            with Image.open(path) as file:
                file.load()
                return _checked(ImageOps.exif_transpose(file), f"{name}: {path}")
        except (*_UNREADABLE, Image.DecompressionBombError) as error:
            raise BadRequest(f"{name}: {path}: no picture that can be read: {_why(error)}") from error
    if isinstance(value, Image.Image):
        try:
            value.load()  # of a file that was opened, and not read yet
        except (*_UNREADABLE, Image.DecompressionBombError) as error:
            raise BadRequest(f"{name}: {value!r:.100}: no picture that can be read: {_why(error)}") from error
        return _checked(value, f"{name}: {value!r:.100}")
    if hasattr(value, "detach") and hasattr(value, "data_ptr"):
        return _of_array(_of_tensor(value, name), name)
    if hasattr(value, "__array_interface__"):
        return _of_array(value, name)
    raise BadRequest(
        f"{name}: {value!r:.100} of type {type(value).__name__} is no picture; give a path, a PIL image, an array or a "
        "tensor"
    )


def _why(error: Exception) -> str:
    """Say why Pillow read no picture, without the path, which its own messages have, too."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "Pillow finds no format in it that it knows; use a PNG or JPEG file"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _checked(picture: Image.Image, what: str) -> Image.Image:
    """Refuse a picture without pixels, and one whose levels Pillow would cut at 255 instead of scaling them.

    Raises:
        BadRequest: names it, and its size or mode.
    """
    if 0 in picture.size:
        raise BadRequest(f"{what}: {picture.width}x{picture.height} pixels; give a picture that has some")
    if picture.mode in _NO_LEVELS or picture.mode.startswith("I;"):
        raise BadRequest(
            f"{what}: pixels of Pillow's mode {picture.mode}, which have no 256 levels to convert; save it with 8 bits "
            "a channel"
        )
    return picture


def _of_tensor(value: torch.Tensor, name: str) -> Any:
    import torch

    if value.is_meta or value.layout != torch.strided:
        raise BadRequest(f"{name}: a tensor without values, or not a dense one; give (3, height, width)")
    found = value.detach().cpu()
    if found.ndim == 4 and found.shape[0] == 1:
        found = found[0]
    if found.ndim != 3 or found.shape[0] not in (1, 3) or not found.is_floating_point():
        raise BadRequest(f"{name}: a tensor of shape {list(value.shape)}; give (3, height, width), floats in [0, 1]")
    return found.float().permute(1, 2, 0).numpy()


def _of_array(array: Any, name: str) -> Image.Image:
    import numpy
    from PIL import Image

    found = numpy.asarray(array)
    if found.ndim == 4 and found.shape[0] == 1:
        found = found[0]
    if found.ndim == 3 and found.shape[2] == 1:
        found = found[:, :, 0]
    if found.ndim not in (2, 3) or (found.ndim == 3 and found.shape[2] != 3) or 0 in found.shape:
        raise BadRequest(f"{name}: an array of shape {list(found.shape)}; give (height, width, 3)")
    if found.dtype == numpy.bool_:
        found = found.astype(numpy.uint8) * 255
    if found.dtype != numpy.uint8:
        if found.dtype.kind != "f" or not (numpy.isfinite(found).all() and found.min() >= 0 and found.max() <= 1):
            raise BadRequest(f"{name}: an array of {found.dtype}; give uint8, or floats in [0, 1]")
        scaled = found.astype(numpy.float64) * 255
        rounded = scaled.round()
        if abs(scaled - rounded).max() > 1e-3:
            raise BadRequest(f"{name}: floats between the 256 levels of a picture; round them to uint8 first")
        found = rounded.astype(numpy.uint8)
    return Image.fromarray(found)


def rgb(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB."""
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize a picture as diffusers does."""
    from PIL import Image

    return picture.resize((width, height), resample=Image.Resampling.LANCZOS)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """Return a picture (1, 3, height, width), float32 in [-1, 1], with channels last in memory, as diffusers has it."""
    return 2.0 * _levels(rgb(picture), 3) - 1.0


def mask_of(picture: Image.Image, width: int, height: int) -> torch.Tensor:
    """Return a mask (1, 1, height, width), float32: 1 where the picture is white.

    Raises:
        BadRequest: Pillow makes no shades of grey of its mode.
    """
    try:
        grey = resized(picture, width, height).convert("L")
    except ValueError as error:  # of LAB
        raise BadRequest(f"mask: {picture!r:.100}: {error}; save it in shades of grey") from error
    levels = _levels(grey, 1)
    return (levels >= 0.5).to(levels.dtype)


def _levels(picture: Image.Image, channels: int) -> torch.Tensor:
    import torch

    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    levels = flat.view(picture.height, picture.width, channels).permute(2, 0, 1)[None]
    return levels.to(torch.float32) / 255.0


def as_list(value: Any) -> Sequence[Any]:
    """Return pictures as a list: one stands for itself."""
    return list(value) if isinstance(value, list | tuple) else [value]
