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
    later = ("xditd.client.lending", "xditd.client.tensor_files", "xditd.client.image_files", "hashlib", "mmap")
    later += ("xditd.client.output_files", "xditd.client.results", "xditd.client.io_blocks", "tempfile", "shutil")
    packages = ("xditd.client.jobs.", "xditd.client.pipeline.", "xditd.client.metadata.", "xditd.ipc.transports.")
    needed = ("xditd.client.jobs.component",)  # names a component of a job; the class that Client's signatures return
    check = (
        f"import xditd.client, sys; print(*[name for name in sys.modules if name not in {needed!r} "
        f"and (name in {later!r} or name.startswith({packages!r}))])"
    )
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_names_that_are_imported_on_first_use_are_those_of_the_package():
    import xditd.client

    assert set(xditd.client._MODULES) <= set(xditd.client.__all__)
    for name, module in xditd.client._MODULES.items():
        owner = getattr(xditd.client, name)
        assert owner.__module__ == f"xditd.client.{module}"
    assert not hasattr(xditd.client, "Clinet")


def test_every_exported_name_exists():
    import xditd.client

    missing = [name for name in xditd.client.__all__ if not hasattr(xditd.client, name)]
    assert missing == []
