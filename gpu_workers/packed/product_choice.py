"""Which product of a packed weight runs: the reference, torch's native one, or comfy-kitchen's.

With ``auto`` each kind of product is measured once on this kind of GPU (``kept_times``). Rank 0 measures and all ranks
follow it, so that results do not depend on the rank. The number of activations plays no part: a share of the tokens is
multiplied as all of them would be, which keeps bits under splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

import torch

from xditd.gpu_workers.packed.kept_times import KeptTimes
from xditd.gpu_workers.packed.kitchen import kitchen_product
from xditd.gpu_workers.packed.native_products import memory_fault, native_product, qualifies
from xditd.gpu_workers.packed.product_times import PRODUCT_NAMES, ProductKind, ProductName
from xditd.gpu_workers.packed.tensors import PackedTensor, Product
from xditd.ipc.errors import Unsupported
from xditd.ipc.settings.daemon import NativeProducts

_LEAST_SIDE: Final = 1024
_MOST_SIDE: Final = 8192
"""The sides of weights that are measured: smaller and larger ones count as these."""
_GAIN: Final = 0.97
"""A native product has to take at most this part of the time of the reference, which does not round the input."""


class Decision(NamedTuple):
    """Which product runs, and, if it is the reference, why no other one does."""

    product: ProductName
    reason: str = ""

    def function_for(self, packed: PackedTensor) -> Product | None:
        """Return the product for a weight of this kind, or ``None`` for the reference.

        Memory that torch does not take is left to the reference, too.
        """
        if self.product == "reference" or memory_fault(packed.values) is not None:
            return None
        return native_product if self.product == "native" else kitchen_product


class ProductChoice:
    """The choices of this process. All ranks ask for the same kinds in the same order.

    ``exchange`` gives this rank's number and returns those of all ranks, as ``rank_sync.share_value`` does.
    """

    def __init__(
        self,
        mode: NativeProducts,
        device: torch.device,
        folder: Path,
        *,
        exchange: Callable[[int], list[int]] = lambda value: [value],
        is_leader: bool = True,
    ) -> None:
        self._mode = mode
        self._device = device
        self._exchange = exchange
        self._is_leader = is_leader
        self._known: dict[ProductKind, Decision] = {}
        self._fastest_of: dict[ProductKind, Decision] = {}
        """Rank 0's decisions by the kinds that are measured (:func:`class_of`)."""
        self._times = KeptTimes(folder, device)

    def choose(self, kinds: Iterable[ProductKind]) -> dict[ProductKind, Decision]:
        """Decide for each kind, whose ``k`` and ``n`` are those of whole weights; measure what is not known yet.

        If others can write to the folder of measurements, or it cannot be made, the reference runs.
        """
        return {kind: self._decide(kind) for kind in kinds}

    def _decide(self, kind: ProductKind) -> Decision:
        if self._mode == "never" or (self._mode == "auto" and self._device.type == "cpu"):
            why = "the setting native_products is never"
            if self._mode == "auto":
                why = "on the CPU the setting native_products has to be always"
            return Decision("reference", kind.refusal or qualifies(kind.format, kind.k, kind.n, self._device) or why)
        found = self._known.get(kind)  # not by its class: which kinds qualify may depend on the rank's GPU
        if found is None:
            found = self._known[kind] = self._agree(kind)
        return found

    def _agree(self, kind: ProductKind) -> Decision:
        """Decide on rank 0; a product that one rank does not have runs on none."""
        reason = kind.refusal or qualifies(kind.format, kind.k, kind.n, self._device)
        own = Decision("reference", reason) if reason else Decision("native")
        if self._is_leader and reason is None and self._mode == "auto":
            try:
                own = self._fastest(class_of(kind))
            except (Unsupported, OSError) as error:  # all ranks are in this exchange
                own = Decision("reference", str(error))
        theirs = self._exchange(PRODUCT_NAMES.index(own.product))
        agreed = PRODUCT_NAMES[theirs[0]]
        if agreed == "reference" or 0 in theirs:
            return Decision("reference", own.reason or "rank 0 chose the reference, or a rank has no native product")
        return Decision(agreed)

    def _fastest(self, kind: ProductKind) -> Decision:
        if kind not in self._fastest_of:
            self._fastest_of[kind] = self._compare(kind)
        return self._fastest_of[kind]

    def _compare(self, kind: ProductKind) -> Decision:
        took = self._times.of(kind)
        if took is None:
            return Decision("reference", "products could not be measured; the log says why")
        best = min((name for name in PRODUCT_NAMES[1:] if name in took), key=took.__getitem__)
        if took[best] <= _GAIN * took["reference"]:
            return Decision(best)
        return Decision(
            "reference", f"measured: {took['reference']:.2f} ms dequantised, {took[best]:.2f} ms {best} ({kind.label})"
        )


def class_of(kind: ProductKind) -> ProductKind:
    """Return the kind that is measured for this one: its sides are the powers of 2 below, from 1024 to 8192."""
    k, n = (min(_MOST_SIDE, max(_LEAST_SIDE, 1 << (side.bit_length() - 1))) for side in (kind.k, kind.n))
    return kind._replace(k=k, n=n)
