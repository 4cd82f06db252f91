"""Pictures and masks in: from paths, Pillow, numpy and torch to the tensors of jobs, resized as diffusers resizes them.

Source: diffusers, ``VaeImageProcessor.preprocess``; tests compare the bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xditd.ipc.addresses import MISSING, user_path
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    import torch
    from PIL import Image

Picture = Any
"""A path, a ``PIL.Image``, an array (height, width, 3) of uint8 or of floats in [0, 1], or a tensor (3, height, width)
of floats in [0, 1]."""


def opened(value: Picture, name: str) -> Image.Image:
    """Return a picture as Pillow's, in RGB or, of a mask, as it is.

    Raises:
        BadRequest: it cannot be read, or is none; ``name`` is that of the argument.
    """
    from PIL import Image, ImageOps

    if isinstance(value, str | os.PathLike):
        path = user_path(value)
        if not path.exists():
            raise BadRequest(f"{name}: {path}: {MISSING}")
        try:
            with Image.open(path) as file:
                file.load()
                return ImageOps.exif_transpose(file)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise BadRequest(f"{name}: {path}: no picture that can be read: {error}") from error
    if isinstance(value, Image.Image):
        return value
    if hasattr(value, "detach") and hasattr(value, "data_ptr"):
        return _of_array(_of_tensor(value, name), name)
    if hasattr(value, "__array_interface__"):
        return _of_array(value, name)
    raise BadRequest(
        f"{name}: {value!r:.100} of type {type(value).__name__} is no picture; give a path, a PIL image, an array or a "
        "tensor"
    )


def _of_tensor(value: torch.Tensor, name: str) -> Any:
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
    """Return a mask (1, 1, height, width), float32: 1 where the picture is white."""
    levels = _levels(resized(picture, width, height).convert("L"), 1)
    return (levels >= 0.5).to(levels.dtype)


def _levels(picture: Image.Image, channels: int) -> torch.Tensor:
    import torch

    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    levels = flat.view(picture.height, picture.width, channels).permute(2, 0, 1)[None]
    return levels.to(torch.float32) / 255.0


def as_list(value: Any) -> Sequence[Any]:
    """Return pictures as a list: one stands for itself."""
    return list(value) if isinstance(value, list | tuple) else [value]
