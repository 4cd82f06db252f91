"""Pictures that go with prompts, as (height, width, 3) tensors of uint8: what the encoder's processor reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    import torch

_DIMENSIONS: Final = 3
_CHANNELS: Final = 3


def image_tensors(images: Sequence[Any]) -> list[torch.Tensor]:
    """Convert PIL images, or arrays and tensors of uint8, (height, width, 3); pixels are not changed.

    Raises:
        BadRequest: another type, dtype or shape, or a picture with transparency.
    """
    if not isinstance(images, (list, tuple)):
        raise BadRequest(f"images: a list of pictures is needed, not {type(images).__name__}")
    return [_tensor(each, f"images[{number}]") for number, each in enumerate(images)]


def _tensor(image: Any, where: str) -> torch.Tensor:
    import torch

    if hasattr(image, "convert") and hasattr(image, "getbands"):  # of PIL, which may not be installed
        if image.mode != "RGB":
            raise BadRequest(f"{where}: a picture of mode {image.mode}; give image.convert('RGB')")
        width, height = image.size
        found = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, _CHANNELS)
    elif isinstance(image, torch.Tensor):
        found = image.detach().cpu()
    elif hasattr(image, "__array_interface__"):
        if str(image.dtype) != "uint8":
            raise BadRequest(f"{where}: an array of {image.dtype}; give (height, width, 3) of uint8, from 0 to 255")
        found = torch.from_numpy(image.copy())
    else:
        raise BadRequest(f"{where}: a {type(image).__name__}; give a PIL image, or (height, width, 3) of uint8")
    if found.dtype != torch.uint8 or found.ndim != _DIMENSIONS or found.shape[-1] != _CHANNELS or 0 in found.shape:
        dtype = str(found.dtype).removeprefix("torch.")
        raise BadRequest(f"{where}: {tuple(found.shape)} of {dtype}; give (height, width, 3) of uint8, from 0 to 255")
    if max(found.shape) > limits.MAX_SIDE_PIXELS:
        raise BadRequest(f"{where}: {tuple(found.shape)}, sides of at most {limits.MAX_SIDE_PIXELS} pixels")
    return found.contiguous()
