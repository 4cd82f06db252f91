"""A model family of an installed package, through a real daemon: lent, plugged into every rank, named in refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xditd.client import BadCheckpoint, UnknownFamily

PACKAGE = Path(__file__).parents[1] / "family_package"


@pytest.mark.slow
def test_a_component_of_another_packages_family_is_lent_and_plugged(start_daemon, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    daemon = start_daemon(2)
    daemon.wait_ready()
    with daemon.connect() as client:
        loan = client.lend({"scale.weight": torch.eye(8)}, kind="transformer", label="matrix")
        assert loan.family == "scale"
        status = client.status()
        assert [(component.label, component.family) for component in status.components] == [("matrix", "scale")]
        assert [worker.loaded for worker in status.workers] == [1, 1]
        with pytest.raises(BadCheckpoint, match=r"odd: checkpoint does not fit scale: .*1 unexpected: other\.weight"):
            client.lend({"scale.weight": torch.eye(8), "other.weight": torch.eye(8)}, kind="transformer", label="odd")
        with pytest.raises(UnknownFamily, match=r"or a matrix of the tests \(scale\.safetensors\)"):
            client.lend({"other.weight": torch.eye(8)}, kind="transformer")
        loan.return_()
        assert [worker.loaded for worker in client.status().workers] == [0, 0]
    daemon.stop()
