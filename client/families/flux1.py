"""Pack latents into FLUX.1's tokens, unpack them, and compute position ids.

Sources: diffusers, ``FluxPipeline`` (``_pack_latents``, ``_unpack_latents``, ``_prepare_latent_image_ids``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import torch

PATCH: Final = 2
"""Height and width of a token in latents."""

ID_AXES: Final = 3
"""Number of coordinates in a position id."""


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack (rows, channels, height, width) into tokens, (rows, height/2 * width/2, channels * 4), contiguous."""
    rows, channels, height, width = latents.shape
    folded = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return folded.reshape(rows, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Unpack the tokens of :func:`pack` to (rows, channels, height, width)."""
    rows, _, channels = tokens.shape
    channels //= PATCH * PATCH
    split = tokens.reshape(rows, height // PATCH, width // PATCH, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(rows, channels, height, width)


class Place(NamedTuple):
    """Where the tokens of an image are: how many, and the position of the first one."""

    rows: int
    columns: int
    plane: int = 0
    top: int = 0
    left: int = 0


def image_positions(rows: int, columns: int, plane: int = 0, top: int = 0, left: int = 0) -> torch.Tensor:
    """Return the position ids of image tokens, (rows * columns, 3), float32: plane, row, column."""
    import torch

    ids = torch.zeros(rows, columns, ID_AXES)
    ids[..., 0] = plane
    ids[..., 1] += torch.arange(top, top + rows)[:, None]
    ids[..., 2] += torch.arange(left, left + columns)[None, :]
    return ids.reshape(rows * columns, ID_AXES)


def text_positions(tokens: int) -> torch.Tensor:
    """Return the position ids of text tokens, (tokens, 3), float32: zeros."""
    import torch

    return torch.zeros(tokens, ID_AXES)
