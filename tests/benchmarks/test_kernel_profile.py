"""Gaps between kernels of a profile: their share, their sums by length, and where the longest are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from kernel_profile import Gap, Kernel, gaps_between, summarise

KERNELS = [
    Kernel("first", 0.0, 10.0),
    Kernel("long", 11.0, 30.0),
    Kernel("beside", 12.0, 20.0),
    Kernel("after", 35.0, 40.0),
    Kernel("last", 60.0, 100.0),
]


def test_a_gap_is_between_the_kernel_that_ends_last_and_the_next_one() -> None:
    assert gaps_between(KERNELS) == [Gap(1.0, "first", "long"), Gap(5.0, "long", "after"), Gap(20.0, "after", "last")]


def test_gaps_are_summed_by_length() -> None:
    found = summarise([KERNELS])
    assert found["gaps"] == pytest.approx(0.26)
    assert found["gaps_of"] == {
        "below 2 us": {"ms": 0.001, "count": 1},
        "2 to 10 us": {"ms": 0.005, "count": 1},
        "above 10 us": {"ms": 0.02, "count": 1},
    }
    assert found["largest_gaps"] == [(20.0, "after", "last"), (5.0, "long", "after"), (1.0, "first", "long")]
    assert found["length_ms"] == 0.1
