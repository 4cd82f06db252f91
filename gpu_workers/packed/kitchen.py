"""comfy-kitchen's product of int8 weights: used instead of torch's where it is installed and was measured faster.

It is optional and imported when it is first asked for. Its CUDA kernels need CUDA 13, as ComfyUI says.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch

from xditd.gpu_workers.packed.tensors import PackedTensor

logger = logging.getLogger(__name__)

_LEAST_CUDA: Final = 13
"""The version of CUDA for which torch has to be built."""
_PLAIN_GROUP: Final = 256
"""The group that its function is given where nothing is rotated."""


@lru_cache(maxsize=1)
def kitchen() -> Any | None:
    """Return the package, or ``None`` if it is not installed or cannot be used here."""
    if find_spec("comfy_kitchen") is None or int((torch.version.cuda or "0").partition(".")[0]) < _LEAST_CUDA:
        return None
    try:
        return import_module("comfy_kitchen")
    except Exception as error:  # noqa: BLE001  # whatever the kernels of a package raise that was built for others
        logger.warning("comfy_kitchen is not used: %s", str(error).partition("\n")[0])
        return None


def kitchen_product(x: torch.Tensor, packed: PackedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply ``x`` (..., columns) by an ``int8`` or ``int8_convrot`` weight: (..., rows) in the dtype of ``x``.

    :func:`kitchen` has to return the package.
    """
    package = kitchen()
    assert package is not None
    return package.int8_linear(
        x,
        packed.values,
        packed.scale,
        bias,
        out_dtype=x.dtype,
        convrot=bool(packed.group),
        convrot_groupsize=packed.group or _PLAIN_GROUP,
    )
