"""Time the products of packed weights on this device, to choose the fastest one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels.timings import times_ms
from xditd.gpu_workers.packed.kitchen import kitchen, kitchen_product
from xditd.gpu_workers.packed.native_products import native_product
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.packed.triton_dequantise import dequantise_fastest
from xditd.ipc.packed import PackedFormat

ProductName = Literal["reference", "native", "kitchen"]
PRODUCT_NAMES: Final[tuple[ProductName, ...]] = get_args(ProductName)

ROWS: Final = 2048
"""Tokens of each product: a share of those of an image."""
_KITCHEN_TOLERANCE: Final = 0.02
"""Relative difference of comfy-kitchen's product from ours: both round to eight bits, in other orders."""


class ProductKind(NamedTuple):
    """Weights (n, k) of one format, and activations of one dtype.

    ``refusal`` says why the file rules a native product out.
    """

    format: PackedFormat
    k: int
    n: int
    group: int
    dtype: torch.dtype
    has_input_scale: bool = False
    refusal: str = ""

    @classmethod
    def of(cls, packed: PackedTensor, dtype: torch.dtype) -> ProductKind:
        """Return the kind of a whole packed matrix: it has to be the same on all ranks."""
        n, k = packed.shape
        refusal = "" if packed.quantises_input else "the file does not allow that the input is rounded"
        if packed.values.dtype == torch.float8_e5m2:
            refusal = "float8_e5m2 has no native product"
        return cls(packed.format, k, n, packed.group, dtype, packed.input_scale is not None, refusal)

    @property
    def label(self) -> str:
        more = f" group {self.group}" if self.group else ""
        more += " input_scale" if self.has_input_scale else ""
        return f"{self.format} {str(self.dtype).removeprefix('torch.')} k {self.k} n {self.n}{more}"


def measure(kind: ProductKind, device: torch.device) -> dict[str, float]:
    """Return milliseconds by product: ``reference``, ``native`` and, if it is there and right, ``kitchen``.

    Raises:
        RuntimeError: torch cannot run one of them, for instance for want of memory.
    """
    with torch.inference_mode():
        packed = _some_weight(kind, device)
        x = torch.randn(ROWS, kind.k, device=device, dtype=kind.dtype)
        scratch = torch.empty(kind.n, kind.k, device=device, dtype=kind.dtype)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "reference": lambda: F.linear(x, dequantise_fastest(packed, scratch)),
            "native": lambda: native_product(x, packed, None),
        }
        if kind.format != "float8" and device.type == "cuda" and _is_kitchen_right(x, packed):
            ways["kitchen"] = lambda: kitchen_product(x, packed, None)
        return times_ms(ways, device)


def _some_weight(kind: ProductKind, device: torch.device) -> PackedTensor:
    shape = kind.n, kind.k
    if kind.format == "float8":
        values = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
    else:
        values = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    each = torch.full((kind.n, 1), 1e-3, device=device)
    one = torch.full((), 0.05, device=device)
    return PackedTensor(
        kind.format,
        shape,
        values,
        one if kind.format == "float8" else each,
        input_scale=one if kind.has_input_scale else None,
        group=kind.group,
    )


def _is_kitchen_right(x: torch.Tensor, packed: PackedTensor) -> bool:
    """Return whether comfy-kitchen is installed, agrees with our product, and keeps its bits if rows are split."""
    if kitchen() is None:
        return False
    try:
        found = kitchen_product(x, packed, None)
        halves = [kitchen_product(half, packed, None) for half in x.split([ROWS // 2 - 1, ROWS // 2 + 1])]
    except Exception:  # noqa: BLE001  # whatever its backends raise on a GPU that they do not support
        return False
    expected = native_product(x, packed, None).float()
    error = (found.float() - expected).norm() / expected.norm()
    return bool(error <= _KITCHEN_TOLERANCE) and torch.equal(torch.cat(halves), found)
