"""Convolve in float32 where the processor has no convolutions in half precision.

torch hands convolutions to oneDNN, which has them in bfloat16 with AVX-512 and in float16 with AVX-512 FP16 or AMX. For
other processors torch has a slow loop of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

NAMES = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
PLAIN = (torch.Tensor, torch.nn.Parameter)


def slow_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes of half precision in which oneDNN does not convolve on this processor."""
    if not torch.backends.mkldnn.is_available():
        return frozenset((torch.bfloat16, torch.float16))
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_fast in fast.items() if not is_fast)


def install(dtypes: frozenset[torch.dtype]) -> None:
    """Let ``torch.nn.functional`` convolve tensors on the CPU of these dtypes in float32, and round the result once.

    Modules of torch and diffusers call its functions. For the whole process, which computes on the CPU; a second call
    changes nothing.
    """
    for name in NAMES if dtypes else ():
        convolve = getattr(functional, name)
        setattr(functional, name, in_float32(getattr(convolve, "__wrapped__", convolve), dtypes))


def in_float32(convolve: Callable[..., torch.Tensor], dtypes: frozenset[torch.dtype]) -> Callable[..., torch.Tensor]:
    """Return ``convolve`` with plain tensors of ``dtypes`` on the CPU widened; anything else it gets as it is."""

    @functools.wraps(convolve)
    def convolve_wide(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        given = [each for each in (input, weight, bias) if each is not None]
        if input.dtype not in dtypes or any(
            each.dtype is not input.dtype or each.device.type != "cpu" or type(each) not in PLAIN for each in given
        ):
            return convolve(input, weight, bias, *args, **kwargs)
        wide = None if bias is None else bias.float()
        return convolve(input.float(), weight.float(), wide, *args, **kwargs).to(input.dtype)

    return convolve_wide
