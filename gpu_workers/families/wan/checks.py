"""Checks of the arguments of a Wan transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xditd.gpu_workers.families.wan.config import (
    IMAGE_TOKENS,
    MOST_POSITIONS,
    PATCH,
    TEXT_TOKENS,
    TIMESTEPS,
    WanConfig,
)
from xditd.gpu_workers.models.job_checks import check_known, check_shape, check_tensor
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest, Unsupported

_INTEGERS = (torch.int32, torch.int64)


def check_video(name: str, video: Any, channels: int, dtype: torch.dtype) -> int:
    """Check latents (rows, channels, frames, rows, columns); return the tokens of a row.

    Raises:
        BadRequest: names what is wrong, and what is accepted.
    """
    check_tensor(name, video, (None, channels, None, None, None), dtype)
    sides = video.shape[2:]
    for side, patch in zip(sides, PATCH, strict=True):
        if side % patch or side // patch > MOST_POSITIONS:
            raise BadRequest(
                f"{name}: {' x '.join(str(each) for each in sides)} frames, rows and columns of latents: rows and "
                f"columns are multiples of {PATCH[1]}, and no axis has more than {MOST_POSITIONS} tokens"
            )
    tokens: int = sides.numel() // (PATCH[0] * PATCH[1] * PATCH[2])
    return tokens


def check_texts(name: str, text: Any, rows: int, config: WanConfig, dtype: torch.dtype | None) -> None:
    """Raise ``BadRequest`` unless ``text`` is (rows, tokens, text channels) of a length that the class tells apart."""
    # The class takes all tokens before the last 512 for those of the image.
    tokens = TEXT_TOKENS if config.image_channels else None
    check_tensor(name, text, (rows, tokens, config.text_channels), dtype)


def check_images(name: str, images: Any, rows: int, config: WanConfig, dtype: torch.dtype) -> None:
    """Check the states of CLIP's vision model: those of one image of each row, or of two.

    A model of a first and a last image takes two one after another, (2 * rows, 257, channels), or the first alone; any
    other takes two one behind the other, (rows, 514, channels), which the class treats as one of more tokens.

    Raises:
        BadRequest: other shapes, or another dtype.
    """
    count, tokens = rows * config.images, IMAGE_TOKENS
    if isinstance(images, torch.Tensor) and images.ndim == 3:
        if config.has_image_positions and images.shape[0] == rows:
            count = rows
        elif not config.has_image_positions and images.shape[1] == 2 * IMAGE_TOKENS:
            tokens = images.shape[1]
    check_tensor(name, images, (count, tokens, config.image_channels), dtype)


def check_timestep(timestep: Any, known: Mapping[str, Sequence[float]], rows: int, tokens: int) -> None:
    """Raise ``BadRequest`` unless ``timestep`` is (rows,) or, a time for each token, (rows, tokens), 0 to 1000.

    It may be an integer, as those of a scheduler are.
    """
    shape = (rows, tokens) if isinstance(timestep, torch.Tensor) and timestep.ndim == 2 else (rows,)
    check_shape("timestep", timestep, shape)
    if timestep.dtype not in _INTEGERS:
        check_tensor("timestep", timestep, shape)
    check_known("timestep", known, 0.0, TIMESTEPS, f"give the {TIMESTEPS} to 0 of a scheduler")


def check_split(layout: ParallelLayout, tokens: int) -> None:
    """Raise ``Unsupported`` if there are fewer tokens than ranks that share a sequence."""
    ranks = layout.degrees.sequence
    if tokens < ranks:
        raise Unsupported(
            f"{tokens} video tokens are too few to split over {ranks} workers: use a larger or longer video, or fewer "
            "workers"
        )
