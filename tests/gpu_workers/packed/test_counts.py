"""Counts of packed products, by format and by the reason why they were not native."""

from __future__ import annotations

from dataclasses import replace

import torch

from xditd.gpu_workers.packed.counts import PackedProductCounts
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc import limits

WEIGHT = PackedTensor("int8", (1, 1), torch.zeros(1, 1, dtype=torch.int8))


def test_each_reason_has_its_number() -> None:
    counts = PackedProductCounts()
    counts.count_native("int8", 3)
    for reason in ("old", "slow", "slow"):
        counts.count_reference(replace(WEIGHT, why_not_native=reason))
    counts.count_reference(replace(WEIGHT, format="q8_0", why_not_native="none"))
    first, second = counts.report()
    assert (first.format, first.native, first.reference) == ("int8", 3, 3)
    assert list(first.why_not_native.items()) == [("slow", 2), ("old", 1)]
    assert (second.format, second.native, second.why_not_native) == ("q8_0", 0, {"none": 1})


def test_the_rarest_reasons_are_counted_together() -> None:
    counts = PackedProductCounts()
    for number in range(limits.MAX_PACKED_REASONS + 4):
        for _ in range(number + 1):
            counts.count_reference(replace(WEIGHT, why_not_native=f"reason {number}"))
    (report,) = counts.report()
    assert len(report.why_not_native) == limits.MAX_PACKED_REASONS
    assert report.why_not_native["other reasons"] == 1 + 2 + 3 + 4 + 5
    assert sum(report.why_not_native.values()) == report.reference


def test_what_is_captured_counts_with_each_replay() -> None:
    counts = PackedProductCounts()
    with counts.apart() as captured:
        counts.count_native("int8", 2)
        counts.count_reference(WEIGHT, "why")
    assert counts.report() == ()
    for _ in range(3):
        counts.add(captured)
    (report,) = counts.report()
    assert (report.native, report.reference, report.why_not_native) == (6, 3, {"why": 3})
