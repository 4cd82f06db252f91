from __future__ import annotations

import time

from xditd.daemon.groups.progress import ProgressWatch
from xditd.daemon.operations.event_loop import Loop


class Bench:
    def __init__(self) -> None:
        self.loop = Loop()
        self.is_busy = True
        self.silences: list[float] = []
        self.told_s: list[float] = []
        self.watch = ProgressWatch(self.loop, lambda: self.is_busy, self.fell_silent)
        self.began_s = time.monotonic()

    def fell_silent(self, silent_s: float) -> None:
        self.silences.append(silent_s)
        self.told_s.append(time.monotonic() - self.began_s)

    def run(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run(lambda: None)


def test_silence_is_told_once_and_not_early() -> None:
    bench = Bench()
    bench.watch.expect(0.1)
    bench.run(0.3)
    assert len(bench.silences) == 1
    assert bench.silences[0] >= 0.1


def test_signs_put_it_off() -> None:
    bench = Bench()
    bench.watch.expect(0.1)
    bench.loop.call_later(0.06, lambda: bench.watch.expect(0.1))
    bench.run(0.4)
    assert len(bench.told_s) == 1
    assert bench.told_s[0] >= 0.16


def test_next_deadline_may_be_shorter() -> None:
    bench = Bench()
    bench.watch.expect(60.0)
    bench.watch.expect(0.1)
    bench.run(0.3)
    assert len(bench.told_s) == 1


def test_idle_or_ended_group_may_be_silent() -> None:
    bench = Bench()
    bench.watch.expect(0.1)
    bench.is_busy = False
    bench.run(0.2)
    bench.is_busy = True
    bench.watch.expect(0.1)
    bench.watch.stop()
    bench.run(0.2)
    assert bench.silences == []


def test_many_commands_leave_one_timer() -> None:
    bench = Bench()
    for _ in range(1_000):
        bench.watch.expect(60.0)
        bench.watch.expect(10.0)
    assert len(bench.loop._timers) <= 2
