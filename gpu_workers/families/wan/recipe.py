"""Sampling with Wan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from xditd.gpu_workers.families.wan.config import WanConfig
from xditd.gpu_workers.models.operations import Model, Wanted
from xditd.ipc.errors import Unsupported


class WanRecipe:
    """See :class:`~xditd.gpu_workers.models.operations.Recipe`."""

    def check(self, config: WanConfig, wanted: Wanted) -> None:
        raise Unsupported("generate: wan makes videos, which Generate does not run yet; run its forward by call")

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        return torch.float32

    def start(
        self, model: Model[WanConfig], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> NoReturn:
        raise Unsupported("generate: wan makes videos, which Generate does not run yet; run its forward by call")
