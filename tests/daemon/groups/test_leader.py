"""The process of a leader, and what is left of it when it cannot be watched."""

from __future__ import annotations

import errno
import os
import sys
import time
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from xditd.daemon.groups.leader import Leader

PROGRAM = "import sys, time; print('runs', flush=True); time.sleep(600)"


@pytest.mark.parametrize("waits", [False, True])
def test_one_that_cannot_be_watched_is_ended(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def refuse(pid: int) -> NoReturn:
        started.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    loop: Any = SimpleNamespace(watch=lambda *_: None, unwatch=lambda *_: None)
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Too many open files"):
        Leader(loop, SimpleNamespace(), [sys.executable, "-c", PROGRAM], {}, print, waits=waits)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) <= fds  # those of earlier tests may be closed meanwhile
    end_s = time.monotonic() + 10
    while os.path.exists(f"/proc/{started[0]}"):
        assert time.monotonic() < end_s
        time.sleep(0.01)
