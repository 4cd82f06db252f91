"""A program, not a test: copy factors in Triton's interpreter on the CPU.

It ends with status 0 if all copies are those of torch.
"""

from __future__ import annotations

import mended_interpreter
import torch

mended_interpreter.mend()

from factor_copy_cases import DTYPES, check_copies  # noqa: E402  # after the interpreter is mended

torch.set_num_threads(1)
for dtype in DTYPES:
    check_copies(dtype, "cpu")
