from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import zmq

from xditd.daemon.operations.event_loop import EventLoop
from xditd.ipc import awake_clock


@pytest.fixture
def loop() -> EventLoop:
    loop = EventLoop()
    loop.call_later(5.0, loop.stop)  # a bug must not hang the test
    return loop


def nothing() -> None:
    pass


def test_timers_run_in_order_and_not_early(loop: EventLoop) -> None:
    seen: list[tuple[str, float]] = []
    began = time.monotonic()
    loop.call_later(0.04, lambda: (seen.append(("late", time.monotonic() - began)), loop.stop()))
    loop.call_later(0.02, lambda: seen.append(("early", time.monotonic() - began)))
    loop.run(nothing)
    assert [name for name, _ in seen] == ["early", "late"]
    assert seen[0][1] >= 0.02
    assert seen[1][1] >= 0.04


def test_cancelled_timer_does_not_run(loop: EventLoop) -> None:
    seen: list[str] = []
    loop.call_later(0.01, lambda: seen.append("wrong")).cancel()
    loop.call_later(0.03, loop.stop)
    loop.run(nothing)
    assert seen == []


def test_descriptor_is_watched_until_it_is_not(loop: EventLoop) -> None:
    read_end, write_end = os.pipe()
    pieces: list[bytes] = []

    def read() -> None:
        pieces.append(os.read(read_end, 1))
        if len(pieces) == 2:
            loop.unwatch(read_end)
            loop.call_later(0.02, loop.stop)

    loop.watch(read_end, read)
    os.write(write_end, b"abc")
    loop.run(nothing)
    assert pieces == [b"a", b"b"]
    loop.unwatch(read_end)  # twice is no error
    os.close(read_end)
    os.close(write_end)


def test_descriptor_closed_by_another_callback_is_not_called(loop: EventLoop) -> None:
    pipes = [os.pipe(), os.pipe()]
    calls: list[int] = []

    def close_both() -> None:
        calls.append(1)
        for read_end, _ in pipes:
            loop.unwatch(read_end)
        loop.stop()

    for read_end, write_end in pipes:
        loop.watch(read_end, lambda: close_both())
        os.write(write_end, b"x")
    loop.run(nothing)
    assert calls == [1]
    for descriptor in (descriptor for pipe in pipes for descriptor in pipe):
        os.close(descriptor)


def test_socket_callback_that_leaves_messages_is_called_again(loop: EventLoop) -> None:
    context = zmq.Context()
    receiver, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    receiver.bind("inproc://loop")
    sender.connect("inproc://loop")
    seen: list[bytes] = []

    def take_one() -> None:
        seen.append(receiver.recv(zmq.NOBLOCK))
        if len(seen) == 3:
            loop.stop()

    loop.watch_socket(receiver, take_one)
    for payload in (b"1", b"2", b"3"):
        sender.send(payload)
    rounds: list[int] = []
    loop.run(lambda: rounds.append(len(seen)))
    assert seen == [b"1", b"2", b"3"]
    assert rounds == [1, 2, 3]
    receiver.close()
    sender.close()
    context.term()


@pytest.fixture
def stand_still(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advance the monotonic clock by so many seconds, as after SIGSTOP and SIGCONT."""
    jumps: list[float] = []
    jumping = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(jumps))
    monkeypatch.setattr(awake_clock, "time", jumping)
    return jumps.append


def test_deadline_is_missed_once_and_not_early(loop: EventLoop) -> None:
    missed: list[float] = []
    deadline = loop.deadline(0.05, lambda: missed.append(deadline.waited_s))
    loop.call_later(0.15, loop.stop)
    loop.run(nothing)
    assert len(missed) == 1
    assert missed[0] >= 0.05


def test_deadline_that_is_stopped_is_not_missed(loop: EventLoop) -> None:
    missed: list[str] = []
    loop.deadline(0.02, lambda: missed.append("wrong")).stop()
    loop.call_later(0.06, loop.stop)
    loop.run(nothing)
    assert missed == []


def test_standstill_of_the_loop_starts_every_deadline_anew(
    loop: EventLoop, stand_still: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    missed: list[float] = []
    began = time.monotonic()
    for _ in range(2):
        loop.deadline(0.1, lambda: missed.append(time.monotonic() - began))
    loop.call_later(0.08, lambda: stand_still(15.0))
    loop.call_later(0.4, loop.stop)
    loop.run(nothing)
    assert len(missed) == 2
    assert min(missed) >= 0.18
    assert "stood still for 15.0 s" in caplog.text


def test_standstill_between_waking_and_judging_counts_too(
    loop: EventLoop, stand_still: Callable[[float], None]
) -> None:
    missed: list[float] = []
    began = time.monotonic()
    loop.call_later(0.05, lambda: stand_still(15.0))
    loop.deadline(0.05, lambda: missed.append(time.monotonic() - began))
    while time.monotonic() - began < 0.06:
        pass  # both are due in the loop's first round
    loop.call_later(0.3, loop.stop)
    loop.run(nothing)
    assert len(missed) == 1
    assert missed[0] >= 0.1


def test_timers_go_on_through_a_standstill(loop: EventLoop, stand_still: Callable[[float], None]) -> None:
    """The daemon's own timers, such as the watchdog's keep-alive, run at once."""
    ran: list[float] = []
    began = time.monotonic()
    loop.call_later(0.02, lambda: stand_still(15.0))
    loop.call_later(0.04, lambda: (ran.append(time.monotonic() - began), loop.stop()))
    loop.run(nothing)
    assert ran[0] < 1.0
