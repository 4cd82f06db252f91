"""What the service does beside its clients' requests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xditd.daemon.front import service as service_module
from xditd.daemon.front.service import WARM_UP_S, Service


def test_messages_are_analysed_soon_after_the_start(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before it: the daemon listens first. Else the first lend would wait for that."""
    timers: dict[float, Callable[[], None]] = {}
    warmed: list[str] = []
    for name in ("request_decoder", "report_decoder"):
        monkeypatch.setattr(getattr(service_module, name), "warm_up", lambda name=name: warmed.append(name))
    monkeypatch.setattr(service.group, "start", lambda: None)
    monkeypatch.setattr(service.loop, "run", lambda _: None)
    monkeypatch.setattr(service.loop, "call_later", timers.__setitem__)
    service.run()
    assert warmed == []
    timers[WARM_UP_S]()
    assert warmed == ["request_decoder", "report_decoder"]
