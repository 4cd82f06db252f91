"""What rounding amounts to: results of models whose layers are wrong in their last bit.

Processors add up in different orders, and some models and pipelines amplify that. A fixed bound is then too narrow on
one processor or too wide on another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

LAST_BIT = 2.0**-23
"""The distance of two neighbours in float32, relative to them."""

BAR = 1e-6
SEEDS = range(3)


@contextlib.contextmanager
def disturbed(models: Iterable[torch.nn.Module], seed: int) -> Iterator[None]:
    """Let each result in float32 of a layer of these models be wrong by up to its last bit, at random."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module: torch.nn.Module, args: object, output: object) -> object:
        if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
            return output * (1 + LAST_BIT * (2 * torch.rand(output.shape, generator=generator) - 1))
        return None

    layers = [layer for model in models for layer in model.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    yield
    for each in hooks:
        each.remove()


def assert_rounding(error: float, disturbed_error: Callable[[int], float]) -> None:
    """Fail if an error is above 1e-6 and above twice that of disturbed models; 5e-5 in any case.

    Args:
        error: relative, of the largest value.
        disturbed_error: returns this error of a run with :func:`disturbed`, by the seed.
    """
    assert error <= 5e-5
    if error > BAR:
        assert error <= 2 * max(map(disturbed_error, SEEDS))
