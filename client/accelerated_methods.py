"""The mark of a module that ``accelerate`` has made run in the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class AcceleratedMethod:
    """Base class of the attributes of a module that replace its methods while the workers run it."""


def is_accelerated(module: torch.nn.Module) -> bool:
    return any(isinstance(each, AcceleratedMethod) for each in vars(module).values())
