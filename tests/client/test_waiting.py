"""Waiting for a daemon continues after temporary errors; only permanent ones end it early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xditd.client.waiting import wait_for
from xditd.ipc.errors import DaemonUnreachable, DeadlineExceeded, NotPermitted, SessionLost, XditdError
from xditd.ipc.status import GroupState


def answers(*errors: XditdError) -> Callable[[], Any]:
    """Status requests that fail with these errors in turn, and then succeed."""
    left = list(errors)

    def look() -> Any:
        if left:
            raise left.pop(0)
        return ANSWER

    return look


ANSWER = SimpleNamespace(group_state=GroupState.READY, group_detail="")


@pytest.mark.parametrize("error", [DaemonUnreachable, DeadlineExceeded, SessionLost])
def test_a_daemon_that_is_silent_for_a_while_is_asked_again(error: type[XditdError]) -> None:
    shown: list[str] = []
    found = wait_for(answers(error("it was stopped")), 30.0, workers=False, show=shown.append)
    assert found is ANSWER
    assert shown == ["it was stopped"]


@pytest.mark.parametrize("error", [DaemonUnreachable, DeadlineExceeded, SessionLost])
def test_a_daemon_that_stays_silent_ends_the_wait_with_its_error(error: type[XditdError]) -> None:
    with pytest.raises(error, match="it was stopped"):
        wait_for(answers(error("it was stopped")), 0.0, workers=False, show=lambda _: None)


def test_a_permanent_error_ends_the_wait_at_once() -> None:
    with pytest.raises(NotPermitted):
        wait_for(answers(NotPermitted("another user's")), 30.0, workers=False, show=lambda _: None)


def test_a_daemon_that_takes_its_time_to_be_silent_is_not_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped daemon delays each request by seconds; that time counts, unlike a suspension of this process."""
    monkeypatch.setattr("xditd.ipc.awake_clock.STANDSTILL_S", 0.2)
    looks = []

    def look() -> Any:
        looks.append(1)
        assert len(looks) < 6
        threading.Event().wait(0.3)
        raise DaemonUnreachable("no daemon answered within 0.3 s")

    with pytest.raises(DaemonUnreachable):
        wait_for(look, 0.6, workers=False, show=lambda _: None)
