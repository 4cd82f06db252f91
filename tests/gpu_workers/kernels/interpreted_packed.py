"""A program, not a test: run the kernels that dequantise packed weights in Triton's interpreter on the CPU.

It ends with status 0 if all
results are those of the references.
"""

from __future__ import annotations

import mended_interpreter
import torch

mended_interpreter.mend()

from packed_cases import (  # noqa: E402  # after the interpreter is mended
    DTYPES,
    GROUPS,
    ODD_SHAPES,
    SHAPES,
    check_empty,
    check_float8,
    check_gguf,
    check_int8,
    check_rotated,
)

torch.set_num_threads(1)
check_empty("cpu")
for dtype in DTYPES:  # the last operation rounds to it, of any shape and group
    is_first = dtype is DTYPES[0]
    for shape in (*SHAPES, *ODD_SHAPES) if is_first else (SHAPES[1], ODD_SHAPES[0]):
        check_int8(shape, dtype, "cpu")
    for group in GROUPS if is_first else (16, 256):
        check_rotated(group, 5, dtype, "cpu")
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        check_float8(kind, (5, 259), dtype, "cpu")
for name in ("q8_0", "q4_k", "q5_k", "q6_k"):
    check_gguf(name, 5, 3, "cpu")
