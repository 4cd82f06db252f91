"""Results of one part of a stress run, printed as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from machine import describe_machine

MOST_LINES = 40
"""Most failures or notes in the table; the JSON object has all."""


@dataclass(frozen=True)
class Findings:
    """Figures, failures, and notes that help to explain them."""

    figures: dict[str, Any]
    failures: list[str]
    notes: list[str]


def as_table(parts: Mapping[str, Findings]) -> str:
    """Return one line for each figure, then the failures; the last line is the verdict."""
    lines = []
    for name, found in parts.items():
        lines.append(f"--- {name}")
        width = max(map(len, found.figures), default=0)
        for title, value in found.figures.items():
            lines.append(f"{title:<{width}}  {spell(value)}")
        lines += [f"note: {note}" for note in found.notes[:MOST_LINES]]
    failures = [f"{name}: {failure}" for name, found in parts.items() for failure in found.failures]
    lines += [f"FAILED: {failure}" for failure in failures[:MOST_LINES]]
    lines.append(f"{len(failures)} failures" if failures else "passed")
    return "\n".join(lines)


def spell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def as_json(parts: Mapping[str, Findings], options: Mapping[str, Any]) -> str:
    """Return one object: the run's options, each part's figures, failures and notes, and the machine."""
    found = {name: {**part.figures, "failed": part.failures, "notes": part.notes} for name, part in parts.items()}
    return json.dumps({**options, **found, "machine": describe_machine()}, indent=1)
