"""Tiny models of diffusers' classes, with seeded weights and arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch


class Random:
    """Seeded tensors on the CPU."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Return int64 values from ``low`` to ``high - 1``."""
        return torch.randint(low, high, shape, generator=self._generator)


@dataclass(frozen=True)
class ClassEntry:
    """A class of diffusers: the configuration of a tiny model, and the arguments of one ``forward``.

    ``arguments`` are those that the class's own pipeline gives, in its types, with every optional one of which the
    pipeline makes use. Its keys are names in the signature. A further entry of the same class, for arguments or a
    configuration that exclude those of the first, has a ``variant``. ``prepare`` is what the pipeline, or the model of
    which this is a part, does to the model before the first call, such as setting attention processors.
    """

    name: str
    config: Mapping[str, Any]
    arguments: Callable[[Random], dict[str, Any]]
    variant: str = ""
    prepare: Callable[[Any], None] | None = None

    @property
    def key(self) -> str:
        """The entry's name in tests, such as ``Flux2Transformer2DModel-kv_cached``."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Build the model in float32, with results of order 1."""
        torch.manual_seed(seed)  # classes that fill parameters without torch.nn.init
        model = getattr(diffusers, self.name).from_config(dict(self.config))
        if self.prepare is not None:
            self.prepare(model)
        fill(model, seed)
        return model.eval().requires_grad_(False)


def fill(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter seeded values with which no layer's result vanishes or grows."""
    random = Random(seed)
    for name, parameter in model.named_parameters():
        values = random.normal(*parameter.shape)
        if parameter.ndim < 2:
            values = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            # The layers of Wan-Animate's motion encoder multiply their weights by it at each call.
            scale = getattr(owner, "scale", None)
            values = values / parameter[0].numel() ** 0.5 / (scale if isinstance(scale, float) else 1.0)
        parameter.data.copy_(values)
