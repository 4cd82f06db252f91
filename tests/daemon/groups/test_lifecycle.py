from __future__ import annotations

from xditd.daemon.groups.lifecycle import STEADY_S, RestartPolicy


def test_delays_double_and_end() -> None:
    policy = RestartPolicy(3)
    assert [policy.note_end(0.0) for _ in range(4)] == [0.25, 0.5, 1.0, None]


def test_delay_has_a_ceiling() -> None:
    policy = RestartPolicy(100)
    assert max(delay for delay in (policy.note_end(0.0) for _ in range(50)) if delay is not None) == 30.0


def test_served_job_starts_the_count_anew() -> None:
    policy = RestartPolicy(1)
    assert policy.note_end(0.0) is not None
    policy.note_served()
    assert policy.note_end(0.0) is not None
    assert policy.note_end(0.0) is None


def test_group_that_stood_for_long_was_sound() -> None:
    policy = RestartPolicy(1)
    assert policy.note_end(0.0) is not None
    assert policy.note_end(STEADY_S) is not None


def test_no_restart_at_all() -> None:
    assert RestartPolicy(0).note_end(0.0) is None
