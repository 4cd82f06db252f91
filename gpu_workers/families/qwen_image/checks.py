"""Checks of the arguments of a Qwen-Image transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from xditd.gpu_workers.families.qwen_image.config import POSITIONS
from xditd.gpu_workers.models.job_checks import check_shape
from xditd.ipc.errors import BadRequest


def check_images(name: str, given: Any, rows: int, tokens: int) -> list[tuple[int, int, int]]:
    """Check the sizes of images, of each row a list of (frames, rows, columns) in tokens; return those of one row.

    Raises:
        BadRequest: not of this form, not the same for all rows, or not of so many tokens together.
    """
    use = f"use a list of {rows}, of each row a list of its images' (frames, rows, columns) in tokens"
    if not isinstance(given, (list, tuple)) or len(given) != rows:
        raise BadRequest(f"{name}: {given!r:.100}: {use}")
    for row, images in enumerate(given):
        if not isinstance(images, (list, tuple)) or not images or not all(map(_is_size, images)):
            raise BadRequest(f"{name}[{row}]: {images!r:.100}: {use}")
    first, *others = ([tuple(size) for size in images] for images in given)
    for row, images in enumerate(others, 1):
        if images != first:
            raise BadRequest(
                f"{name}[{row}]: {images!r:.100} is not {first!r:.100}: all rows have images of equal sizes"
            )
    if sum(map(math.prod, first)) != tokens:
        raise BadRequest(f"{name}: {first!r:.100} is {sum(map(math.prod, first))} tokens, hidden_states have {tokens}")
    return [(frames, high, wide) for frames, high, wide in first]


def _is_size(size: Any) -> bool:
    return (
        isinstance(size, (list, tuple))
        and len(size) == 3
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
    )


def check_mask(name: str, mask: Any, rows: int, tokens: int) -> None:
    """Raise ``BadRequest`` unless ``mask`` is a tensor (rows, tokens)."""
    check_shape(name, mask, (rows, tokens))
    if mask.is_complex():
        raise BadRequest(f"{name}: dtype is {mask.dtype}, use torch.bool")


def check_positions(name: str, images: Sequence[tuple[int, int, int]], text_tokens: int) -> None:
    """Raise ``BadRequest`` if the tables of positions are too short for these images and this text."""
    longest = max(side // 2 for _, *sides in images for side in sides)
    if longest + text_tokens > POSITIONS or sum(frames for frames, *_ in images) > POSITIONS:
        raise BadRequest(
            f"{name}: {text_tokens} tokens after images of up to {2 * longest} rows or columns: the model has "
            f"positions for {POSITIONS - longest} tokens"
        )


def as_mask(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return a mask as booleans on ``device``; ``None`` if all tokens count, as in diffusers' pipelines."""
    if mask is None or bool(mask.all()):
        return None
    return mask.to(device, torch.bool)
