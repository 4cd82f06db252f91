"""Gaps between kernels of a profile: their share, their sums by length, and where the longest are."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

# By its path: with benchmarks/ in sys.path, its run.py would stand for that of tests/stress/.
spec = spec_from_file_location(
    "kernel_profile", Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_profile.py"
)
assert spec is not None
assert spec.loader is not None
kernel_profile = sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(kernel_profile)
Gap, Kernel = kernel_profile.Gap, kernel_profile.Kernel
gaps_between, summarise = kernel_profile.gaps_between, kernel_profile.summarise

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
