"""The demo's report: each single fault makes the demo fail."""

import json

import pytest

from xditd.client.demo.report import Report, versions


@pytest.fixture
def good(tmp_path):
    image = tmp_path / "demo.png"
    image.write_bytes(b"png")
    return Report(
        device_kind="cpu",
        workers=2,
        parallel={"ulysses": 2},
        image=str(image),
        size=(256, 256),
        steps=8,
        dtype="float32",
        seconds={"daemon_start": 0.1, "workers_ready": 5.0, "lend": 0.2, "first_image": 2.0, "second_image": 1.0},
        parity=1e-7,
        parity_bar=1e-6,
        is_lent_once=True,
    )


def test_a_good_report_passes_and_is_complete(good, tmp_path):
    good.write(tmp_path / "demo.json")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["passed"] is True
    assert written["bytes_downloaded"] == 0
    assert set(written["seconds"]) == {"daemon_start", "workers_ready", "lend", "first_image", "second_image"}
    assert {"workers", "device_kind", "parallel", "image", "components", "parity", "versions"} <= set(written)
    assert "0 bytes" in good.summary()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parity": 1e-5}, "parity 1e-05 is above its limit 1e-06"),
        ({"parity": float("nan")}, "parity nan"),
        ({"image": "/nowhere/demo.png"}, "was not written"),
        ({"is_lent_once": False}, "were plugged again for the second image"),
        ({"outside_connections": ["workers tried 192.0.2.1:443"]}, "192.0.2.1:443"),
    ],
)
def test_each_fault_fails_it_by_name(good, change, says):
    for name, value in change.items():
        setattr(good, name, value)
    assert len(good.faults()) == 1
    assert says in good.faults()[0]
    assert good.as_json()["passed"] is False


def test_after_a_connection_the_bytes_are_unknown(good):
    good.outside_connections = ["the demo tried to reach 192.0.2.1:443"]
    assert good.as_json()["bytes_downloaded"] is None
    assert "unknown" in good.summary()


def test_versions_name_what_is_missing_too(monkeypatch):
    monkeypatch.setattr("xditd.client.demo.report._PACKAGES", ("pyzmq", "no-such-package"))
    found = versions()
    assert found["pyzmq"][0].isdigit()
    assert found["no-such-package"] == "not installed"
