"""How often packed weights were multiplied on a rank: natively or dequantised, and why not natively."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, get_args

from xditd.ipc import limits
from xditd.ipc.packed import PackedFormat
from xditd.ipc.status import PackedProducts

if TYPE_CHECKING:
    from xditd.gpu_workers.packed.tensors import PackedTensor

_NATIVE: Final = ""
_OTHERS: Final = "other reasons"
_UNNAMED: Final = "no native product was asked for"

Counted = Counter[tuple[str, str]]
"""Products by format, and by the reason why they were not native; the empty one is that of native products."""


class PackedProductCounts:
    """The products of a rank since it started."""

    def __init__(self) -> None:
        self._counted: Counted = Counter()

    def count_native(self, packed_format: str, products: int = 1) -> None:
        self._counted[packed_format, _NATIVE] += products

    def count_reference(self, packed: PackedTensor, reason: str = "") -> None:
        """Count a product of a dequantised weight; ``reason`` is that of a weight which has a native product."""
        self._counted[packed.format, packed.why_not_native or reason or _UNNAMED] += 1

    @contextmanager
    def apart(self) -> Iterator[Counted]:
        """Count the products of a forward that is captured, and not run, in the counter that is yielded instead."""
        before, self._counted = self._counted, Counter()
        try:
            yield self._counted
        finally:
            self._counted = before

    def add(self, counted: Counted) -> None:
        """Count products once more that were counted :meth:`apart`: those of a graph that is replayed."""
        self._counted.update(counted)

    def report(self) -> tuple[PackedProducts, ...]:
        """Return the counts of each format that was multiplied."""
        by_format: dict[str, dict[str, int]] = {}
        for (packed_format, reason), count in self._counted.items():
            by_format.setdefault(packed_format, {})[reason] = count
        return tuple(_report(each, by_format[each]) for each in get_args(PackedFormat) if each in by_format)


def _report(packed_format: PackedFormat, counts: dict[str, int]) -> PackedProducts:
    native = counts.pop(_NATIVE, 0)
    reasons = dict(sorted(counts.items(), key=lambda item: -item[1]))
    kept = dict(list(reasons.items())[: limits.MAX_PACKED_REASONS - 1])
    left = sum(reasons.values()) - sum(kept.values())
    return PackedProducts(
        format=packed_format,
        reference=sum(reasons.values()),
        native=native,
        why_not_native=kept | ({_OTHERS: left} if left else {}),
    )
