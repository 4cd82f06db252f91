"""Announcements wait for idle workers; they are few, each once, and end with their session."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from xditd.daemon.loans.announcements import MAX_WAITING, Announcements
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.outlines import Outline, OutlinedTensor
from xditd.ipc.worker_messages import BuildModel, Done, RankTally

ONE: Any = object()
OTHER: Any = object()


def outline(label: str) -> Outline:
    return Outline(label=label, tensors=(OutlinedTensor("a", "bfloat16", (2,)),))


def labels(announcements: Announcements) -> list[str]:
    """Take all; the labels of their commands."""
    found = []
    while (task := announcements.take()) is not None:
        command = next(task.script)(3)
        assert isinstance(command, BuildModel)
        found.append(command.outline.label)
    return found


def test_each_is_built_once_in_order() -> None:
    announcements = Announcements()
    for label in ("a", "b", "a", "b", "c"):
        announcements.add(ONE, outline(label))
    assert labels(announcements) == ["a", "b", "c"]
    assert announcements.take() is None
    announcements.add(ONE, outline("a"))  # the workers may have dropped it
    assert labels(announcements) == ["a"]


def test_few_wait_and_the_newest_stay() -> None:
    announcements = Announcements()
    for number in range(3 * MAX_WAITING):
        announcements.add(ONE, outline(str(number)))
    assert len(announcements) == MAX_WAITING
    assert labels(announcements) == [str(number) for number in range(2 * MAX_WAITING, 3 * MAX_WAITING)]


def test_those_of_an_ended_session_are_dropped() -> None:
    announcements = Announcements()
    announcements.add(ONE, outline("a"))
    announcements.add(OTHER, outline("b"))
    announcements.forget(ONE)
    assert labels(announcements) == ["b"]


def test_it_ends_with_the_answers_and_a_refusal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    announcements = Announcements()
    announcements.add(ONE, outline("a"))
    task = announcements.take()
    assert task is not None
    next(task.script)
    done = Done(group_token="token123", rank=0, op_number=3, timings_ms={"build": 5.0}, tally=RankTally())
    try:
        task.script.send([done])
    except StopIteration as end:
        task.on_done(end.value)
    assert "build_ms=5.0" in caplog.text
    task.on_failed(BadCheckpoint("nothing fits"))
    assert "model not built ahead label=a code=bad_checkpoint: nothing fits" in caplog.text
