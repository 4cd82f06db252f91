"""Dtypes of half precision."""

from __future__ import annotations

from typing import Final

import torch

HALF_DTYPES: Final = frozenset({torch.bfloat16, torch.float16})
