from __future__ import annotations

import time

from xditd.daemon.loop import Loop
from xditd.daemon.progress import ProgressWatch


class Bench:
    def __init__(self) -> None:
        self.loop = Loop()
        self.is_busy = True
        self.silences: list[float] = []
        self.watch = ProgressWatch(self.loop, 0.1, lambda: self.is_busy, self.silences.append)

    def run(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run(lambda: None)


def test_silence_is_told_once_and_not_early() -> None:
    bench = Bench()
    bench.watch.begin()
    bench.run(0.3)
    assert len(bench.silences) == 1
    assert bench.silences[0] >= 0.1


def test_reports_put_it_off() -> None:
    bench = Bench()
    began_s = time.monotonic()
    told_s: list[float] = []
    bench.watch = ProgressWatch(bench.loop, 0.1, lambda: True, lambda _: told_s.append(time.monotonic() - began_s))
    bench.watch.begin()
    bench.loop.call_later(0.06, bench.watch.note_report)
    bench.run(0.4)
    assert len(told_s) == 1
    assert told_s[0] >= 0.16


def test_idle_or_ended_group_may_be_silent() -> None:
    bench = Bench()
    bench.watch.begin()
    bench.is_busy = False
    bench.run(0.2)
    bench.is_busy = True
    bench.watch.begin()
    bench.watch.stop()
    bench.run(0.2)
    assert bench.silences == []
