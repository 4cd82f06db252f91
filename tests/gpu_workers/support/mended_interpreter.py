"""Make Triton's interpreter round as GPUs do; import it before kernels, in a process of its own.

Triton 3.7's interpreter drops bits of a float32 that becomes a bfloat16, and the carry of 7.9 that becomes an e4m3; its
``tl.dot`` multiplies the bits of bfloat16 as if they were whole numbers.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from typing import Any

import numpy
import torch
from triton.runtime import interpreter

_TARGETS = {interpreter.tl.float8e4nv: torch.float8_e4m3fn, interpreter.tl.bfloat16: torch.bfloat16}
_BITS = {torch.float8_e4m3fn: torch.uint8, torch.bfloat16: torch.uint16}


def mend() -> None:
    theirs = interpreter._convert_float

    def convert(given: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == interpreter.tl.float32 and target in _TARGETS:
            dtype = _TARGETS[target]
            wide = torch.from_numpy(numpy.ascontiguousarray(given).view(numpy.float32).copy())
            return wide.to(dtype).view(_BITS[dtype]).numpy().reshape(given.shape)
        return theirs(given, source, target, rounding)

    builder = interpreter.InterpreterBuilder
    their_dot = builder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        a, b = (interpreter.TensorHandle(_wide(each), interpreter.tl.float32) for each in (a, b))
        return their_dot(self, a, b, d, *more)

    interpreter._convert_float = convert
    builder.create_dot = dot


def _wide(given: Any) -> Any:
    """Return the numbers of a bfloat16 or float16 array in float32."""
    if given.dtype.scalar == interpreter.tl.bfloat16:
        return (given.data.astype(numpy.uint32) << 16).view(numpy.float32)
    return given.data.astype(numpy.float32)
