"""Deprecated attribute names: they work in this release, with a warning that names the new one (docs/upgrading.md)."""

from __future__ import annotations

import warnings
from typing import Any


class Renamed:
    """Descriptor for an attribute or a method under its old name."""

    def __init__(self, new: str) -> None:
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        warnings.warn(f"{self._old} is called {self._new} now", DeprecationWarning, stacklevel=2)
        return getattr(instance, self._new)
