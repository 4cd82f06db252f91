"""When a standby leader is started."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from xditd.daemon.groups.standby import Standby

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
