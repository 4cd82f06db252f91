"""What the tests of the daemon's modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """A runtime folder sets the mask of the whole process: tests that come later start from a known one."""
    before = os.umask(0o022)
    yield
    os.umask(before)
