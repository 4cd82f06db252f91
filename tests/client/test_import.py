"""What importing the client costs: no torch, no numpy, and little time."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "PIL", "tqdm", "xfuser", "diffusers", "transformers", "safetensors")


@pytest.mark.parametrize("module", ["xditd.client", "xditd.client.cli.main"])
def test_imports_nothing_heavy(module):
    check = f"import {module}, sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_imports_quickly():
    # Processor time, and the best of five: a busy machine must not fail this, a careless import must.
    check = "import time; t = time.process_time(); import xditd.client; print(time.process_time() - t)"
    runs = [subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True) for _ in range(5)]
    assert min(float(run.stdout) for run in runs) <= 0.15


def test_every_exported_name_exists():
    import xditd.client

    missing = [name for name in xditd.client.__all__ if not hasattr(xditd.client, name)]
    assert missing == []
