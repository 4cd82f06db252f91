"""The part speedup reads what the part modules has written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def speedup(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "parts"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speedup

    yield speedup
    for name in ("speedup", "measuring"):
        sys.modules.pop(name, None)


def test_speedups_are_by_model_size_and_acceleration(speedup: Any) -> None:
    report = {
        "machine": {"gpus": []},
        "flux1, auto, 2 workers": {"in_a_row_ms": 60.0},
        "flux1, auto, 1 workers": {"in_a_row_ms": 120.0},
        "flux1 large, auto, 1 workers": {"in_a_row_ms": 500.0},
        "flux1 large, auto, 4 workers": {"in_a_row_ms": 125.0},
        "flux1, eager, 1 workers": {"in_a_row_ms": 200.0},
        "wan, auto, 2 workers": {"in_a_row_ms": 10.0},
    }
    took, found = speedup.speedups(report)
    assert found == {"flux1": {1: 1.0, 2: 2.0}, "flux1 large": {1: 1.0, 4: 4.0}}
    assert took["flux1"] == {1: 120.0, 2: 60.0}
