"""Numbers in Prometheus's text format.

``prometheus_client`` would do too. It is one more dependency in the client's environment, and was slower to import (0.8
to 1.0 s on a busy machine, where this module with all that it needs took 0.5 s), for what is here in forty lines.

Source: Prometheus, "Exposition formats", text-based format 0.0.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from xditd.daemon.operations.counters import Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, object]


class Exposition:
    """Collect samples, then :meth:`render` them. Samples of one name follow each other."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def gauge(self, name: str, help: str, *samples: tuple[Labels, float]) -> None:
        self._family(name, "gauge", help)
        for labels, value in samples:
            self._sample(name, labels, value)

    def counter(self, name: str, help: str, *samples: tuple[Labels, float]) -> None:
        """``name`` ends in ``_total``."""
        self._family(name, "counter", help)
        for labels, value in samples:
            self._sample(name, labels, value)

    def histogram(self, name: str, help: str, *samples: tuple[Labels, Histogram]) -> None:
        self._family(name, "histogram", help)
        for labels, found in samples:
            total = 0
            for bound, count in zip((*found.bounds, math.inf), found.counts, strict=True):
                total += count
                self._sample(f"{name}_bucket", {**labels, "le": _number(bound)}, total)
            self._sample(f"{name}_sum", labels, found.sum)
            self._sample(f"{name}_count", labels, total)

    def render(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _family(self, name: str, kind: str, help: str) -> None:
        self._lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]

    def _sample(self, name: str, labels: Labels, value: float) -> None:
        inner = ",".join(f'{key}="{_escape(str(text))}"' for key, text in labels.items())
        self._lines.append(f"{name}{{{inner}}} {_number(value)}" if inner else f"{name} {_number(value)}")


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)
