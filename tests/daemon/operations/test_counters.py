from __future__ import annotations

import re

import pytest

from xditd.daemon.operations.counters import Accounts, Histogram
from xditd.daemon.operations.exposition import Exposition
from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint, Cancelled
from xditd.ipc.tensors import CopiedBytes
from xditd.ipc.worker_messages import StepReached


def step(number: int, elapsed_s: float) -> StepReached:
    return StepReached(group_token="t", rank=0, op_number=1, step=number, total_steps=9, elapsed_s=elapsed_s)


def test_jobs_are_counted_by_outcome_and_timed_when_served() -> None:
    accounts = Accounts()
    accounts.job_ended("generate", None, 0.2, 3.0)
    accounts.job_ended("generate", Cancelled("enough"), 0.2, 0.1)
    accounts.job_ended("lend", BadCheckpoint("a.weight is missing"), 0.0, 0.1)
    assert accounts.jobs == {("generate", "done"): 1, ("generate", "cancelled"): 1, ("lend", "failed"): 1}
    assert accounts.ran["generate"].sum == 3.0
    assert accounts.waited["generate"].sum == pytest.approx(0.4)
    (error,) = accounts.last_errors()
    assert (error.where, error.code, error.detail) == ("lend", "bad_checkpoint", "a.weight is missing")


def test_last_errors_are_bounded_and_newest_first() -> None:
    accounts = Accounts()
    for number in range(limits.MAX_LAST_ERRORS + 5):
        accounts.note_error("workers", BadCheckpoint(f"{number} " + "x" * 100_000))
    errors = accounts.last_errors()
    assert len(errors) == limits.MAX_LAST_ERRORS
    assert errors[0].detail.startswith(f"{limits.MAX_LAST_ERRORS + 4} ")
    assert max(len(error.detail) for error in errors) <= 500
    assert errors[0].age_s <= errors[-1].age_s


def test_steps_are_differences_within_a_job() -> None:
    accounts = Accounts()
    for report in (step(1, 0.5), step(2, 0.6), step(1, 0.1), step(2, 0.3)):
        accounts.step_reached(report)
    assert accounts.steps.sum == pytest.approx(0.9)
    assert sum(accounts.steps.counts) == 4


def test_lends_add_up_by_tier_and_kind() -> None:
    accounts = Accounts()
    accounts.lent({"file": 10}, CopiedBytes(host_to_device=10))
    accounts.lent({"file": 5, "host_shm": 1}, CopiedBytes(host_to_device=5, peer=2))
    assert (accounts.lent_bytes["file"], accounts.lent_bytes["host_shm"]) == (15, 1)
    assert (accounts.copied_bytes["host_to_device"], accounts.copied_bytes["peer"]) == (15, 2)


def test_text_format() -> None:
    found = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        found.add(value)
    text = Exposition()
    text.gauge("x_up", "Whether it is.", ({}, True), ({"path": 'a"b\\c\nd'}, 0.25))
    text.histogram("x_seconds", "How long.", ({"op": "lend"}, found))
    lines = text.render().splitlines()
    assert lines == [
        "# HELP x_up Whether it is.",
        "# TYPE x_up gauge",
        "x_up 1",
        'x_up{path="a\\"b\\\\c\\nd"} 0.25',
        "# HELP x_seconds How long.",
        "# TYPE x_seconds histogram",
        'x_seconds_bucket{op="lend",le="0.1"} 2',
        'x_seconds_bucket{op="lend",le="1"} 3',
        'x_seconds_bucket{op="lend",le="+Inf"} 4',
        'x_seconds_sum{op="lend"} 7.65',
        'x_seconds_count{op="lend"} 4',
    ]
    assert re.search(r"\n\Z", text.render())
