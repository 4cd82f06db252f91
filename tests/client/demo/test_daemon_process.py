"""The demo's daemon, when it does not start."""

import pytest

from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.errors import DaemonUnreachable, WorkersUnavailable


def test_connect_fails_at_once_if_the_daemon_has_exited(tmp_path):
    daemon = DaemonProcess(tmp_path / "daemon.log", 1, "cpu", ["--workers", "none"])
    says = r"the daemon exited with status 2; .*log ends:\n(.*\n)*.*none"
    with pytest.raises(DaemonUnreachable, match=says):
        daemon.connect()
    with pytest.raises(WorkersUnavailable, match=says):
        daemon.wait_ready(None, print)
    daemon.stop(None)
    assert not daemon.runtime_dir.exists()
