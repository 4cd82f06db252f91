"""How much a module's result depends on roundings: what another order of sums could change in bfloat16 or float16.

Products over fewer tokens or rows may run in other kernels, which sum in another order. A deep model makes more of
such a difference in the last place: measured with random weights, 6e-3 to 8e-2 of the norm of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch

from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES
from xditd.gpu_workers.packed.linear import PackedLinear

_SHARE: Final = 1 / 8
"""The share of the values whose last place is changed: about as many differ between two kernels of cuBLAS."""
_SEED: Final = 1


@contextmanager
def rounding_noise(module: torch.nn.Module) -> Iterator[None]:
    """Change the last place of some values of every linear layer's result in bfloat16 or float16, while in the block.

    Results of packed layers are changed, too, since the next native product rounds them to eight bits. Each run changes
    the same values, and does not use torch's own generators.
    """
    layers = [each for each in module.modules() if isinstance(each, torch.nn.Linear | PackedLinear)]
    generators: dict[torch.device, torch.Generator] = {}
    handles = [each.register_forward_hook(partial(_change_last_places, generators)) for each in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _change_last_places(generators: dict[torch.device, torch.Generator], _: Any, __: Any, result: Any) -> Any:
    if not isinstance(result, torch.Tensor) or result.dtype not in HALF_DTYPES:
        return result
    device = result.device
    if device not in generators:
        generators[device] = torch.Generator(device).manual_seed(_SEED)
    is_changed = torch.rand(result.shape, device=device, generator=generators[device]) < _SHARE
    bits = result.view(torch.int16)
    return torch.where(is_changed, bits ^ 1, bits).view(result.dtype)
