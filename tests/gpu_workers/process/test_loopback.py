"""The check of the loopback interface."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xditd.gpu_workers.process import loopback
from xditd.gpu_workers.process.loopback import check_loopback
from xditd.ipc.errors import Unsupported

ALONE = ["unshare", "--map-root-user", "--net"]


def test_it_is_up_here() -> None:
    check_loopback()


def test_one_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "LOOPBACK", "nowhere0")
    with pytest.raises(Unsupported, match=r"network interface nowhere0: No such device"):
        check_loopback()


def test_one_that_is_down_is_named_with_the_remedy() -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace may be made here")
    check = "from xditd.gpu_workers.process.loopback import check_loopback; check_loopback()"
    done = subprocess.run([*ALONE, sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert "Unsupported: network interface lo: it is down" in done.stderr
    assert "ip link set lo up" in done.stderr
