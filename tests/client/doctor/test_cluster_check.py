"""The doctor's word on clusters."""

from __future__ import annotations

from xditd.client.doctor.findings import Verdict
from xditd.client.doctor.host import check_cluster


def test_a_host_of_a_cluster_is_told_the_risk(tmp_path):
    assert check_cluster({}, tmp_path) is None
    found = check_cluster({"XDITD_CLUSTER": "10.0.0.1:6379"}, tmp_path)
    assert found is not None
    assert found.verdict is Verdict.WARN
    assert "can run code as this user on every host" in found.detail


def test_a_host_that_has_joined_is_told_so_without_any_variable(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "8").mkdir()  # has ended
    words = ["python", "-P", "-m", "xditd.client.cluster.member", "10.0.0.1:6379", "a", "", "/models", ""]
    (tmp_path / "7" / "cmdline").write_bytes("\0".join(words).encode())
    found = check_cluster({}, tmp_path)
    assert found is not None
    assert found.detail.startswith("this host has joined 10.0.0.1:6379 as a: who holds the token")
