"""The ``weight`` of a packed layer, for a model's code that reads it besides calling the layer.

Most such code asks for a dtype or a device. Some multiplies by the weight itself: attention poolings of diffusers give
those of their layers to ``F.multi_head_attention_forward``. A tensor on meta in its place is no error on the CPU: torch
2.11 multiplies by it without a word, and the result is whatever the memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class ShownWeight(torch.Tensor):
    """A tensor without memory that has its values once an operation reads them: a copy made by ``values``.

    Shape, dtype and device are those of that copy, and cost nothing. Writes are lost, as those to any copy.
    """

    _values: Callable[[], torch.Tensor]

    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, values: Callable[[], torch.Tensor]
    ) -> ShownWeight:
        shown: ShownWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        shown._values = values
        return shown

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(ShownWeight, lambda shown: shown._values(), (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)
