"""Where a step's time goes: the kernels that take most of the GPU's, and how long the GPU waits for the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch

_STEPS: Final = 3
_KERNELS: Final = 12


def profile(name: str, step: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run three steps under the profiler, print a table, and return what the last one returned.

    The steps must not be recorded as CUDA graphs yet: these run the same kernels, but are launched at once.
    """
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.monotonic()
        for _ in range(_STEPS):
            result = step()
        torch.cuda.synchronize()
        wall = (time.monotonic() - started) * 1e3 / _STEPS
    found = [each for each in profiler.key_averages() if each.device_type != torch.autograd.DeviceType.CPU]
    found.sort(key=lambda each: -each.self_device_time_total)
    busy = sum(each.self_device_time_total for each in found) / 1e3 / _STEPS
    launches = sum(each.count for each in found) / _STEPS
    print(
        f"{name}: a step as Python launches it: {wall:.1f} ms, of which the GPU works {busy:.1f} ms in "
        f"{launches:.0f} kernels; the rest is the host's",
        flush=True,
    )
    for each in found[:_KERNELS]:
        spent = each.self_device_time_total / 1e3 / _STEPS
        print(f"  {spent:7.2f} ms {each.count / _STEPS:6.0f} x  {each.key[:110]}", flush=True)
    return result


class Parts:
    """Mean milliseconds of a step's parts on the GPU's stream, over the steps that are timed."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._events: list[list[torch.cuda.Event]] = []

    def begin(self) -> None:
        self._events.append([])
        self.mark()

    def mark(self) -> None:
        """End a part, in the order of the names."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events[-1].append(event)

    def __str__(self) -> str:
        torch.cuda.synchronize()
        rows = [[one.elapsed_time(two) for one, two in pairwise(row)] for row in self._events]
        means = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        return ", ".join(f"{name} {mean:.1f} ms" for name, mean in zip(self._names, means, strict=True))
