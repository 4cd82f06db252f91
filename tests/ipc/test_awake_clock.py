from __future__ import annotations

import threading

import pytest

from xditd.ipc import awake_clock
from xditd.ipc.awake_clock import STANDSTILL_S, TICK_S, AwakeClock


class Monotonic:
    """A monotonic clock that the test sets."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def run(self, seconds: float, clock: AwakeClock) -> None:
        """Let time pass while the process runs, and so reads its clock."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + TICK_S)
            clock.now_s()


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Monotonic:
    real = Monotonic()
    monkeypatch.setattr(awake_clock, "time", real)
    return real


def test_time_in_which_the_process_runs_is_counted(real: Monotonic) -> None:
    clock = AwakeClock()
    began_s = clock.now_s()
    real.run(7.0, clock)
    assert clock.now_s() - began_s == pytest.approx(7.0)
    assert clock.waited_s(began_s) == pytest.approx(7.0)
    assert clock.stood_still_s == 0.0


def test_a_standstill_is_not_counted_and_grants_all_the_time_again(real: Monotonic) -> None:
    clock = AwakeClock()
    began_s = clock.now_s()
    real.run(7.0, clock)
    real.now_s += 3600.0
    assert clock.waited_s(began_s) == 0.0
    assert clock.now_s() - began_s == pytest.approx(7.0)
    assert clock.stood_still_s == pytest.approx(3600.0)
    real.run(2.0, clock)
    assert clock.waited_s(began_s) == pytest.approx(2.0)


def test_what_began_after_a_standstill_is_timed_from_its_beginning(real: Monotonic) -> None:
    clock = AwakeClock()
    real.now_s += 60.0
    clock.now_s()
    real.run(5.0, clock)
    began_s = clock.now_s()
    real.run(1.0, clock)
    assert clock.waited_s(began_s) == pytest.approx(1.0)


def test_a_busy_moment_is_no_standstill(real: Monotonic) -> None:
    clock = AwakeClock()
    began_s = clock.now_s()
    real.now_s += 0.9 * STANDSTILL_S
    assert clock.waited_s(began_s) == pytest.approx(0.9 * STANDSTILL_S)


def test_threads_that_see_one_standstill_count_it_once(real: Monotonic) -> None:
    clock = AwakeClock()
    before_s = clock._read_s
    real.now_s += 30.0
    clock.now_s()
    clock._read_s = before_s  # another thread had read this before the first one wrote
    clock.now_s()
    assert clock.stood_still_s == pytest.approx(30.0)


def test_a_thread_that_reads_while_another_excludes_a_standstill_waits_for_it(real: Monotonic) -> None:
    """The moment between a thread's look at the gap and its exclusion: the second thread counts no gap either."""
    clock = AwakeClock()
    began_s = clock.now_s()
    real.now_s += 30.0
    waited_s: list[float] = []
    second = threading.Thread(target=lambda: waited_s.append(clock.waited_s(began_s)))
    exclude = clock._skip_gap

    def exclude_late(gap_s: float, read_s: float) -> None:
        clock._skip_gap = exclude
        second.start()
        second.join(timeout=10)
        exclude(gap_s, read_s)

    clock._skip_gap = exclude_late
    assert clock.waited_s(began_s) == 0.0
    assert waited_s == [0.0]
    assert clock.stood_still_s == pytest.approx(30.0)


def test_a_call_that_waits_by_itself_is_counted(real: Monotonic) -> None:
    clock = AwakeClock()
    began_s = clock.now_s()
    for _ in range(3):
        real.now_s += 10.0
        clock.count_gap()
    assert clock.waited_s(began_s) == pytest.approx(30.0)
    assert clock.stood_still_s == 0.0
