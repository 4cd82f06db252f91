from __future__ import annotations

import pytest

from xditd.daemon.operations.counters import EventCounters, Histogram
from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint, Cancelled
from xditd.ipc.tensors import CopiedBytes
from xditd.ipc.worker_messages import StepReached


def step(number: int, elapsed_s: float) -> StepReached:
    return StepReached(group_token="t", rank=0, op_number=1, step=number, total_steps=9, elapsed_s=elapsed_s)


def test_jobs_are_counted_by_outcome_and_timed_when_served() -> None:
    counters = EventCounters()
    counters.job_ended("generate", None, 0.2, 3.0)
    counters.job_ended("generate", Cancelled("enough"), 0.2, 0.1)
    counters.job_ended("lend", BadCheckpoint("a.weight is missing"), 0.0, 0.1)
    assert counters.jobs == {("generate", "done"): 1, ("generate", "cancelled"): 1, ("lend", "failed"): 1}
    assert counters.outcomes({"generate", "call"}) == {"done": 1, "failed": 0, "cancelled": 1}
    assert counters.ran["generate"].sum == 3.0
    assert counters.waited["generate"].sum == pytest.approx(0.4)
    (error,) = counters.last_errors()
    assert (error.where, error.code, error.detail) == ("lend", "bad_checkpoint", "a.weight is missing")


def test_last_errors_are_bounded_and_newest_first() -> None:
    counters = EventCounters()
    for number in range(limits.MAX_LAST_ERRORS + 5):
        counters.note_error("workers", BadCheckpoint(f"{number} " + "x" * 100_000))
    errors = counters.last_errors()
    assert len(errors) == limits.MAX_LAST_ERRORS
    assert errors[0].detail.startswith(f"{limits.MAX_LAST_ERRORS + 4} ")
    assert max(len(error.detail) for error in errors) <= 500
    assert errors[0].age_s <= errors[-1].age_s


def test_steps_are_differences_within_a_job() -> None:
    counters = EventCounters()
    for report in (step(1, 0.5), step(2, 0.6), step(1, 0.1), step(2, 0.3)):
        counters.step_reached(report)
    assert counters.steps.sum == pytest.approx(0.9)
    assert sum(counters.steps.counts) == 4


def test_lends_add_up_by_tier_and_kind() -> None:
    counters = EventCounters()
    counters.lent({"file": 10}, CopiedBytes(host_to_device=10))
    counters.lent({"file": 5, "host_shm": 1}, CopiedBytes(host_to_device=5, peer=2))
    assert (counters.lent_bytes["file"], counters.lent_bytes["host_shm"]) == (15, 1)
    assert (counters.copied_bytes["host_to_device"], counters.copied_bytes["peer"]) == (15, 2)


def test_buckets_add_up_from_below() -> None:
    found = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        found.add(value)
    assert found.cumulative() == [("0.1", 2), ("1", 3), ("+Inf", 4)]
    assert found.sum == pytest.approx(7.65)
