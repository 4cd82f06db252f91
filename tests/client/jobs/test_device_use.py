"""How much room results get in device memory: what the last such call took."""

from __future__ import annotations

from typing import Any

import pytest

from xditd.client.jobs.device_use import DeviceUse
from xditd.ipc.arguments import Argument, InIo, ListOf, TupleOf
from xditd.ipc.replies import Called

MIB = 2**20
KEY = ("c1", "forward")


class Session:
    """What is asked of a session: that it can be remembered."""


def called(*trees: Argument) -> Called:
    return Called(request_id="1", results=trees, timings_ms={})


def result(mib: float, **more: Any) -> InIo:
    return InIo(offset_bytes=0, dtype="uint8", shape=(int(mib * MIB),), **more)


@pytest.fixture
def use() -> DeviceUse:
    return DeviceUse()


def room_of(use: DeviceUse) -> int | None:
    return use.room(Session(), KEY).device_bytes  # type: ignore[arg-type]


def test_large_results_get_room_from_the_second_call_on(use: DeviceUse) -> None:
    assert room_of(use) is None
    use.note_results(KEY, called(TupleOf(items=(result(2), ListOf(items=(result(3), result(0.5)))))), 0)
    assert room_of(use) == 5 * MIB
    assert use.room(Session(), ("c1", "decode")).device_bytes is None  # type: ignore[arg-type]
    use.note_results(KEY, called(result(2, in_device_io=True)), 5 * MIB)
    assert room_of(use) == 2 * MIB
    use.note_results(KEY, called(result(0.5)), 2 * MIB)
    assert room_of(use) == 0


def test_room_that_workers_cannot_write_to_is_not_offered_again(use: DeviceUse) -> None:
    use.note_results(KEY, called(result(2)), 2 * MIB)
    assert room_of(use) == 0
    use.note_results(KEY, called(result(2)), 0)
    assert room_of(use) == 0


def test_a_session_that_refused_uses_host_memory_alone(use: DeviceUse) -> None:
    refusing, other = Session(), Session()
    use.refuse(refusing)  # type: ignore[arg-type]
    assert not use.room(refusing, KEY).is_on_device  # type: ignore[arg-type]
    assert use.room(other, KEY).is_on_device  # type: ignore[arg-type]
