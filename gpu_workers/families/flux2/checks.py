"""Checks of the arguments of a FLUX.2 transformer."""

from __future__ import annotations

from typing import Any

import torch

from xditd.gpu_workers.families.flux2.config import CHANNELS
from xditd.gpu_workers.models.job_checks import check_tensor
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import Unsupported


def check_images(name: str, tokens: Any, dtype: torch.dtype) -> None:
    """Raise ``BadRequest`` unless ``tokens`` is (rows, tokens, 128) in ``dtype``."""
    check_tensor(name, tokens, (None, None, CHANNELS), dtype)


def check_split(layout: ParallelLayout, text_tokens: int, image_tokens: int) -> None:
    """Raise ``Unsupported`` if there are fewer tokens than ranks that share a sequence."""
    ranks = layout.degrees.sequence
    if text_tokens < ranks or image_tokens < ranks:
        raise Unsupported(
            f"{text_tokens} text and {image_tokens} image tokens are too few to split over {ranks} workers: use a "
            "larger image, a longer prompt or fewer workers"
        )
