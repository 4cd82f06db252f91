"""When a standby leader is started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xditd.daemon.groups import standby as standby_module
from xditd.daemon.groups.standby import ANSWER_S, DELAY_S, IMPORTS_S, Standby

OWN = (sys.executable, "-m", "xditd.gpu_workers")


@pytest.mark.parametrize(
    ("setting", "device_kind", "command", "is_started"),
    [
        ("auto", "cuda", OWN, True),
        ("auto", "cpu", OWN, False),
        ("on", "cpu", OWN, True),
        ("off", "cuda", OWN, False),
        ("on", "cuda", ("numactl", "-N0", *OWN), True),
        ("on", "cuda", ("./workers.sh",), False),  # another program may not know the flag
    ],
)
def test_where_it_is_worth_it(setting: str, device_kind: str, command: tuple[str, ...], is_started: bool) -> None:
    asked: list[float] = []
    loop: Any = SimpleNamespace(call_later=lambda delay_s, _: asked.append(delay_s) or SimpleNamespace(cancel=list))
    configuration: Any = SimpleNamespace(standby=setting, worker_command=command)
    standby = Standby(loop, SimpleNamespace(), configuration, {})  # type: ignore[arg-type]
    standby.start_later(device_kind)
    assert bool(asked) is is_started
    standby.end(lambda: asked.clear())
    standby.start_later(device_kind)
    assert not asked  # a daemon that stops starts none


@pytest.mark.parametrize(
    ("has_imported", "age_s", "allowed_s"),
    [(True, 500.0, ANSWER_S), (True, 1.0, ANSWER_S), (False, 10.0, IMPORTS_S - 10.0), (False, 500.0, ANSWER_S)],
)
def test_how_long_one_that_is_taken_may_be_silent(
    has_imported: bool, age_s: float, allowed_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that still imports needs the rest of that time."""
    timers: list[tuple[float, Callable[[], None]]] = []
    begun: list[tuple[list[str], float]] = []
    clock = SimpleNamespace(now_s=lambda: 0.0, waited_s=lambda since_s: age_s - since_s)
    loop: Any = SimpleNamespace(
        clock=clock, call_later=lambda *timer: timers.append(timer) or SimpleNamespace(cancel=list)
    )
    leader = SimpleNamespace(
        pid=1, has_imported=has_imported, begin=lambda flags, answer_s, _: begun.append((flags, answer_s))
    )
    monkeypatch.setattr(standby_module, "Leader", lambda *_, waits: leader)
    standby = Standby(loop, SimpleNamespace(), SimpleNamespace(standby="on", worker_command=OWN), {})  # type: ignore[arg-type]
    standby.start_later("cpu")
    delay_s, start = timers[0]
    assert delay_s == DELAY_S
    start()
    assert standby.take(["--flag"], lambda *_: None, lambda: None) is leader
    assert begun == [(["--flag"], allowed_s)]
