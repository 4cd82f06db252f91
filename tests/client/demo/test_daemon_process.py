"""The demo's own daemon, when it does not get far."""

import pytest

from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.errors import DaemonUnreachable, WorkersUnavailable


def test_a_daemon_that_has_ended_is_not_waited_for(tmp_path):
    daemon = DaemonProcess(tmp_path / "daemon.log", 1, "cpu", ["--workers", "none"])
    says = r"the daemon exited with status 2; .*log ends:\n(.*\n)*.*none"
    with pytest.raises(DaemonUnreachable, match=says):
        daemon.connect()
    with pytest.raises(WorkersUnavailable, match=says):
        daemon.wait_ready(None, print)
    daemon.stop(None)
    assert not daemon.runtime_dir.exists()
