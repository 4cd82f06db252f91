"""Checks of the arguments of a Z-Image transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xditd.gpu_workers.families.z_image.config import (
    AXES_LENGTHS,
    LATENT_CHANNELS,
    MAX_TEXT_TOKENS,
    PATCH,
    ZImageConfig,
    padded,
)
from xditd.gpu_workers.models.job_checks import check_batch, check_tensor
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.token_partition import partition_evenly
from xditd.ipc.errors import BadRequest


def check_list(name: str, rows: Any, count: int | None = None) -> None:
    """Raise ``BadRequest`` unless ``rows`` is a list of ``count`` items (``None``: any number up to the limit)."""
    if not isinstance(rows, (list, tuple)):
        raise BadRequest(f"{name}: {type(rows).__name__} where a list is needed, with a tensor for each row")
    check_batch(name, len(rows))
    if count is not None and len(rows) != count:
        raise BadRequest(f"{name}: {len(rows)} rows, use {count}, one for each image")


def check_texts(name: str, texts: Sequence[torch.Tensor], config: ZImageConfig) -> None:
    """Raise ``BadRequest`` if a text is not (tokens, channels), has too many tokens, or a dtype that no layer takes."""
    for row, text in enumerate(texts):
        check_tensor(f"{name}[{row}]", text, (None, config.text_channels))
        if text.dtype == torch.float64:  # the class's norm keeps it, and float32 layers refuse it
            raise BadRequest(f"{name}[{row}]: dtype is float64, use float32, or a floating dtype of 16 bits")
        if len(text) > MAX_TEXT_TOKENS:
            raise BadRequest(f"{name}[{row}]: {len(text)} tokens, use {MAX_TEXT_TOKENS} at most")


def check_image(name: str, image: Any, dtype: torch.dtype) -> None:
    """Raise ``BadRequest`` if ``image`` is not (16, 1, height, width) in ``dtype``, with sides that can be embedded."""
    check_tensor(name, image, (LATENT_CHANNELS, 1, None, None), dtype)
    most = AXES_LENGTHS[1] * PATCH
    if any(side % PATCH or side > most for side in image.shape[2:]):
        raise BadRequest(f"{name}: shape is {list(image.shape)}, use multiples of {PATCH} up to {most} on a side")


def check_split(layout: ParallelLayout, image_tokens: int, text_tokens: Sequence[int]) -> None:
    """Raise ``Unsupported`` if there are too few tokens for the ranks that share a sequence."""
    ranks = layout.degrees.sequence
    for tokens, what in ((image_tokens, "image tokens"), *((each, "text tokens") for each in text_tokens)):
        partition_evenly(padded(tokens), ranks, what)
