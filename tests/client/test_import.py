"""Importing the client loads no torch and no numpy. benchmarks/parts/control_plane.py measures its time."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "PIL", "tqdm", "xfuser", "diffusers", "transformers", "safetensors")


@pytest.mark.parametrize("module", ["xditd.client", "xditd.client.cli.main"])
def test_imports_nothing_heavy(module):
    check = f"import {module}, sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_what_only_some_calls_need_is_imported_by_them():
    """Modules for lending, files and jobs are imported on first use, not by a script that only asks for a status."""
    later = ("xditd.client.lending", "xditd.client.tensor_files", "xditd.ipc.transports.file", "hashlib", "mmap")
    check = f"import xditd.client, sys; print(*[name for name in {later!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_every_exported_name_exists():
    import xditd.client

    missing = [name for name in xditd.client.__all__ if not hasattr(xditd.client, name)]
    assert missing == []
