"""A wrong result, a hang and a broken promise fail a run; what a fault may bring along does not."""

from __future__ import annotations

import time

import pytest
from record import SILENCE_S, Record, TypedError, is_lost


@pytest.fixture
def record():
    return Record()


def fail(record, action, code):
    record.add_event(1, {"ends": "error", "action": action, "code": code, "took_s": 1.0, "detail": "why"})


def test_right_results_are_no_failure(record):
    record.add_event(1, {"begins": "job"})
    record.add_event(1, {"ends": "right", "took_s": 2.0})
    assert (record.right, record.slowest_s, record.find_failures()) == (1, 2.0, [])


def test_a_wrong_result_is_a_failure(record):
    record.add_event(1, {"ends": "wrong", "took_s": 2.0, "detail": "finish: checkpoint 1, seed 3: other bits"})
    assert record.find_failures() == ["1 wrong results"]
    assert "checkpoint 1, seed 3" in record.notes[0]


def test_a_request_beyond_its_deadline_is_a_failure(record):
    fail(record, "finish", "deadline_exceeded")
    assert record.find_failures() == ["1 requests hung"]


def test_a_silent_client_is_a_failure_once(record):
    record.start_client(1)
    now = time.monotonic()
    assert record.find_silent_clients(now + SILENCE_S - 1) == []
    assert record.find_silent_clients(now + SILENCE_S + 1) == [1]
    assert record.find_silent_clients(now + SILENCE_S + 2) == []
    assert record.find_failures() == ["1 requests hung"]


@pytest.mark.parametrize("code", ["workers_lost", "lease_lost", "session_lost"])
def test_what_others_faults_bring_along_is_no_failure(record, code):
    fail(record, "finish", code)
    assert record.find_failures() == []


@pytest.mark.parametrize(
    ("action", "code"),
    [("cancel", "cancelled"), ("rewrite-file", "stale_source"), ("nan-weight", "not_finite"), ("return", "lease_lost")],
)
def test_a_deed_ends_as_expected_and_for_nobody_else(record, action, code):
    fail(record, action, code)
    assert record.find_failures() == []
    assert not is_lost(record.errors[0])
    if code != "lease_lost":
        fail(record, "finish", code)
        assert record.find_failures() == [f"1 x finish: unexpected {code}; first: client 1: why"]


@pytest.mark.parametrize("code", ["internal", "bad_message", "bad_request", "out_of_memory"])
def test_any_other_error_is_a_failure(record, code):
    fail(record, "nan-weight", code)
    fail(record, "nan-weight", code)
    assert record.find_failures() == [f"2 x nan-weight: unexpected {code}; first: client 1: why"]


def test_no_daemon_is_a_failure_unless_a_fault_took_it(record):
    record.expect_daemon_gone(60.0)
    fail(record, "session", "daemon_unreachable")
    assert record.find_failures() == []
    other = Record()
    fail(other, "session", "daemon_unreachable")
    assert len(other.find_failures()) == 1


def test_a_success_where_an_error_was_due_is_a_failure(record):
    record.add_event(2, {"ends": "broken", "action": "nan-weight", "detail": "call: a success on weights with a NaN"})
    assert record.find_failures() == ["1 x nan-weight; first: client 2: call: a success on weights with a NaN"]


def test_which_errors_mean_that_a_request_was_lost():
    assert is_lost(TypedError(0.0, "finish", "lease_lost", ""))
    assert is_lost(TypedError(0.0, "cancel", "workers_lost", ""))
    assert not is_lost(TypedError(0.0, "return", "lease_lost", ""))
    assert not is_lost(TypedError(0.0, "finish", "stale_source", ""))
