"""A program, not a test: multiply rows with weights and add branches in Triton's interpreter on the CPU.

It ends with status 0 if all results are those of the references.
"""

from __future__ import annotations

import mended_interpreter
import torch

mended_interpreter.mend()

from branch_cases import DTYPES, SHAPES, SMALL_TILES, check_multiply_with_branch  # noqa: E402  # after the interpreter is mended

torch.set_num_threads(1)
for dtype in DTYPES:
    for shape in SHAPES if dtype is DTYPES[0] else SHAPES[:2]:  # the dtype is only what is rounded to
        check_multiply_with_branch(shape, dtype, "cpu", tiles=SMALL_TILES)
