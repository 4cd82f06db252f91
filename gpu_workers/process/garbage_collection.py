"""Imports without garbage collections. This module imports no torch: the leader needs it before it imports torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Run no garbage collection within, and leave all objects that exist at the end out of later ones.

    Collections would visit the imported objects again and again, and write to pages that ranks share.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
