"""Checks of the arguments of a FLUX.2 transformer."""

from __future__ import annotations

from typing import Any

import torch

from xditd.gpu_workers.families.flux2.config import CHANNELS
from xditd.gpu_workers.models.job_checks import check_tensor


def check_images(name: str, tokens: Any, dtype: torch.dtype) -> None:
    """Raise ``BadRequest`` unless ``tokens`` is (rows, tokens, 128) in ``dtype``."""
    check_tensor(name, tokens, (None, None, CHANNELS), dtype)
