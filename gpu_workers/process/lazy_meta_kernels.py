"""Import torch without its meta kernels in Python, a quarter of what it imports: only lends need them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Final

from xditd.gpu_workers.process.lazy_modules import LazyModule, defer_module

META_KERNELS: Final = "torch._meta_registrations"
"""The module that registers them, and imports the decompositions and references that they need."""


def defer_meta_kernels() -> None:
    """Let torch be imported without :data:`META_KERNELS`, until the module's code is run or a name in it is asked for.

    Call before torch is imported; later it does nothing. Until the code runs, models on the meta device have only the
    meta kernels that are written in C++.
    """
    torch = importlib.util.find_spec("torch")
    if "torch" in sys.modules or torch is None or torch.origin is None:
        return
    path = Path(torch.origin).with_name(f"{META_KERNELS.rpartition('.')[2]}.py")
    spec = importlib.util.spec_from_file_location(META_KERNELS, path)
    if spec is not None and path.exists():  # another version may have none
        defer_module(spec, LazyModule)
