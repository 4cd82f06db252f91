"""The doctor's word on clusters."""

from __future__ import annotations

from xditd.client.doctor.findings import Verdict
from xditd.client.doctor.host import check_cluster


def test_a_host_of_a_cluster_is_told_the_risk():
    assert check_cluster({}) is None
    found = check_cluster({"XDITD_CLUSTER": "10.0.0.1:6379"})
    assert found is not None
    assert found.verdict is Verdict.WARN
    assert "can run code as this user on every host" in found.detail
