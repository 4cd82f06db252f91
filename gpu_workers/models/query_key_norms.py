"""The epsilon of query and key norms: diffusers' classes have their own, and some modules of ComfyUI that of float32.

It is torch's default for inputs of any dtype but float64.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch

FLOAT32_EPSILON: Final = torch.finfo(torch.float32).eps

_NAMES: Final = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
"""Of diffusers' attention modules."""


class QueryKeyNorms:
    """The query and key norms of a module, which share one epsilon."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._norms = [
            cast(Any, each)
            for path, each in module.named_modules()
            if path.rpartition(".")[2] in _NAMES and hasattr(each, "eps")
        ]
        self._own = self._current = self._norms[0].eps

    def use(self, epsilon: float | None) -> None:
        """Set the epsilon of all, ``None`` for that of the class; without a change it costs one comparison."""
        wanted = self._own if epsilon is None else epsilon
        if wanted == self._current:
            return
        self._current = wanted
        for each in self._norms:
            each.eps = wanted
