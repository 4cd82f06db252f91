"""Imports make no garbage collections, and what they leave is in none later."""

from __future__ import annotations

import gc
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

from xditd.gpu_workers.process.garbage_collection import without_collections

LEADER = """
import sys
import xditd.gpu_workers.__main__
assert "torch" not in sys.modules
"""


def test_what_is_made_without_collections_is_in_no_later_one() -> None:
    gc.unfreeze()
    made = SimpleNamespace()
    try:
        assert gc.is_tracked(made)
        with suppress(ImportError), without_collections():
            assert not gc.isenabled()
            raise ImportError("no torch")
        assert gc.isenabled()
        assert all(each is not made for each in gc.get_objects())
    finally:
        gc.unfreeze()


def test_the_leader_turns_collections_off_before_it_imports_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LEADER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
