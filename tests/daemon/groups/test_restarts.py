from __future__ import annotations

from xditd.daemon.groups.restarts import STEADY_S, RestartBudget


def test_delays_double_and_end() -> None:
    budget = RestartBudget(3)
    assert [budget.note_end(0.0) for _ in range(4)] == [0.25, 0.5, 1.0, None]


def test_delay_has_a_ceiling() -> None:
    budget = RestartBudget(100)
    assert max(delay for delay in (budget.note_end(0.0) for _ in range(50)) if delay is not None) == 30.0


def test_served_job_starts_the_count_anew() -> None:
    budget = RestartBudget(1)
    assert budget.note_end(0.0) is not None
    budget.note_served()
    assert budget.note_end(0.0) is not None
    assert budget.note_end(0.0) is None


def test_group_that_stood_for_long_was_sound() -> None:
    budget = RestartBudget(1)
    assert budget.note_end(0.0) is not None
    assert budget.note_end(STEADY_S) is not None


def test_no_restart_at_all() -> None:
    assert RestartBudget(0).note_end(0.0) is None
