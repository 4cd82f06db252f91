"""The arguments and the results of forwards: mappings, lists, tuples and objects with tensors in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a value, in order: of a mapping, a list or a tuple, else of an object's attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(vars(value))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating tensors of nested arguments."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: cast(each, dtype) for key, each in value.items()}
    return type(value)(cast(each, dtype) for each in value) if isinstance(value, (list, tuple)) else value
