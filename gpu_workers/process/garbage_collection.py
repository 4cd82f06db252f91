"""Imports without garbage collections. This module imports no torch: the leader uses it around torch's own import."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Leave all objects that are made within out of garbage collections, then and later.

    Collections would visit what was imported again and again, and write to pages that ranks share.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
