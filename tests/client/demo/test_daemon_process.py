"""The demo's daemon, when it does not start, and when it does not stop."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.errors import BadRequest, DaemonUnreachable, WorkersUnavailable


def test_connect_fails_at_once_if_the_daemon_has_exited(tmp_path):
    daemon = DaemonProcess(tmp_path / "daemon.log", 1, "cpu", ["--workers", "none"])
    says = r"the daemon exited with status 2; .*log ends:\n(.*\n)*.*none"
    with pytest.raises(DaemonUnreachable, match=says):
        daemon.connect()
    with pytest.raises(WorkersUnavailable, match=says):
        daemon.wait_ready(None, print)
    daemon.stop(None)
    assert not daemon.runtime_dir.exists()


def test_an_interrupt_while_the_daemon_stops_leaves_nothing(tmp_path):
    daemon = DaemonProcess(tmp_path / "daemon.log", 1, "cpu")
    daemon.connect().close()
    os.kill(daemon.pid, signal.SIGSTOP)  # it does not answer, and SIGTERM waits
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            daemon.stop(None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not daemon.runtime_dir.exists()
    assert not Path(f"/proc/{daemon.pid}").exists()


def test_a_folder_too_long_for_sockets_is_refused_by_its_name(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(BadRequest, match=r"^TMPDIR: sockets below .*longlong would .* such as /tmp$"):
        DaemonProcess(tmp_path / "daemon.log", 1, "cpu")
    assert not list(long.iterdir())
