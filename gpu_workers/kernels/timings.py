"""Time several ways to compute the same, on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Final, TypeVar

import torch

NameT = TypeVar("NameT", bound=str)

_WARM_UPS: Final = 2
_REPEATS: Final = 7
_IN_A_ROW: Final = 4
"""Calls between two events of a GPU."""
_AHEAD_CYCLES: Final = 10_000_000
"""Cycles for which the GPU waits before them, until the host has launched all: 5 ms at 2 GHz."""


def times_ms(
    ways: Mapping[NameT, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = _REPEATS,
    ahead_cycles: int = _AHEAD_CYCLES,
) -> dict[NameT, float]:
    """Time each way in turns, so that a change of the clock rate meets all; return the medians in milliseconds.

    A GPU waits for ``ahead_cycles`` before the calls of a way, until the host has launched all: in a forward the host
    is ahead, too.
    """
    took: dict[NameT, list[float]] = {name: [] for name in ways}
    for number in range(_WARM_UPS + repeats):
        for name, way in ways.items():
            one_ms = _time_ms(way, device, ahead_cycles)
            if number >= _WARM_UPS:
                took[name].append(one_ms)
    return {name: median(each) for name, each in took.items()}


def _time_ms(way: Callable[[], object], device: torch.device, ahead_cycles: int) -> float:
    """Return milliseconds of one call, of several in a row."""
    if device.type != "cuda":
        started = time.perf_counter()
        way()
        return (time.perf_counter() - started) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(ahead_cycles)
    begin.record()
    for _ in range(_IN_A_ROW):
        way()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / _IN_A_ROW
