"""Further calls of classes that have an entry: other arguments, or another configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from class_entries import ENTRIES
from class_entry import ClassEntry, Random

Change = Callable[[Random, dict[str, Any]], dict[str, Any]]
"""From a source of numbers and an entry's arguments, those in place of some of them."""


def further(key: str, variant: str, change: Change | None = None, **config: Any) -> ClassEntry:
    """Return the entry of a further call: that of ``key`` with some arguments and some of its configuration changed."""
    own = ENTRIES[key]

    def arguments(random: Random) -> dict[str, Any]:
        given = own.arguments(random)
        return given if change is None else given | change(random, given)

    return ClassEntry(own.name, {**own.config, **config}, arguments, variant, own.prepare)
