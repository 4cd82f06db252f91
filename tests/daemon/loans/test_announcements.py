"""Announcements wait for idle workers; they are few, each once, and end with their session."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from xditd.daemon.loans.announcements import MAX_WAITING, QUIET_S, Announcements
from xditd.ipc.errors import BadCheckpoint, OutOfMemory
from xditd.ipc.outlines import Outline, OutlinedTensor
from xditd.ipc.worker_messages import BuildModel, Done, ModelBuilt, RankTally, WarmUpModel

ONE: Any = object()
OTHER: Any = object()


Later = list[tuple[float, Callable[[], None]]]


@pytest.fixture
def later() -> Later:
    """What the announcements ask to be called with, and after how many seconds."""
    return []


@pytest.fixture
def announcements(later: Later) -> Announcements:
    return Announcements(lambda seconds, call: later.append((seconds, call)))


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


def run(task: Any, *, has_warm_up: bool = False) -> Any:
    """Answer a task's command; return the command."""
    command = next(task.script)(3)
    common: dict[str, Any] = {"group_token": "token123", "rank": 0, "op_number": 3, "tally": RankTally()}
    if isinstance(command, BuildModel):
        answer: Any = ModelBuilt(**common, timings_ms={"build": 5.0}, has_warm_up=has_warm_up)
    else:
        answer = Done(**common, timings_ms={})
    with pytest.raises(StopIteration) as end:
        task.script.send([answer])
    task.on_done(end.value.value)
    return command


def test_each_is_built_once_in_order(announcements: Announcements) -> None:
    for label in ("a", "b", "a", "b", "c"):
        announcements.add(ONE, outline(label))
    assert labels(announcements) == ["a", "b", "c"]
    assert announcements.take() is None
    announcements.add(ONE, outline("a"))  # the workers may have dropped it
    assert labels(announcements) == ["a"]


def test_few_wait_and_the_newest_stay(announcements: Announcements) -> None:
    for number in range(3 * MAX_WAITING):
        announcements.add(ONE, outline(str(number)))
    assert len(announcements) == MAX_WAITING
    assert labels(announcements) == [str(number) for number in range(2 * MAX_WAITING, 3 * MAX_WAITING)]


def test_those_of_an_ended_session_are_dropped(announcements: Announcements) -> None:
    announcements.add(ONE, outline("a"))
    announcements.add(OTHER, outline("b"))
    announcements.forget(ONE)
    assert labels(announcements) == ["b"]


def test_a_model_is_warmed_up_once_nothing_was_asked_for_a_while(announcements: Announcements, later: Later) -> None:
    for label in ("a", "b", "c"):
        announcements.add(ONE, outline(label))
        run(announcements.take(), has_warm_up=label != "b")
    assert announcements.take() is None
    assert [seconds for seconds, _ in later] == [QUIET_S] * 2
    for _, call in later:
        call()
    announcements.add(OTHER, outline("d"))
    commands = [run(announcements.take()) for _ in range(3)]
    assert [(type(each), each.outline.label) for each in commands] == [
        (BuildModel, "d"),
        (WarmUpModel, "a"),
        (WarmUpModel, "c"),
    ]
    assert announcements.take() is None


def test_few_models_wait_for_their_warm_up(announcements: Announcements, later: Later) -> None:
    """A client that announces all the time keeps any from being warmed up."""
    for number in range(3 * MAX_WAITING):
        announcements.add(ONE, outline(str(number)))
        run(announcements.take(), has_warm_up=True)
        later[-1][1]()
    commands = [run(task) for task in iter(announcements.take, None)]
    assert [each.outline.label for each in commands] == [str(at) for at in range(2 * MAX_WAITING, 3 * MAX_WAITING)]


def test_no_model_is_warmed_up_for_an_ended_session(announcements: Announcements, later: Later) -> None:
    for label in ("a", "b"):
        announcements.add(ONE, outline(label))
        run(announcements.take(), has_warm_up=True)
    later[0][1]()
    announcements.forget(ONE)
    later[1][1]()
    assert announcements.take() is None


def test_no_model_is_warmed_up_for_a_session_that_ended_during_its_build(
    announcements: Announcements, later: Later
) -> None:
    announcements.add(ONE, outline("a"))
    task = announcements.take()
    announcements.forget(ONE)
    run(task, has_warm_up=True)
    assert later == []
    announcements.add(ONE, outline("a"))
    run(announcements.take(), has_warm_up=True)
    assert len(later) == 1


def test_what_two_clients_announce_is_built_if_the_first_one_ends(announcements: Announcements) -> None:
    announcements.add(ONE, outline("a"))
    announcements.add(OTHER, outline("a"))
    announcements.forget(ONE)
    assert labels(announcements) == ["a"]


def test_it_ends_with_the_answers_and_a_refusal_is_logged(
    announcements: Announcements, later: Later, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    announcements.add(ONE, outline("a"))
    task = announcements.take()
    assert task is not None
    run(task, has_warm_up=True)
    assert "build_ms=5.0" in caplog.text
    task.on_failed(BadCheckpoint("nothing fits"))
    assert "model not built ahead label=a code=bad_checkpoint: nothing fits" in caplog.text
    later[0][1]()
    task = announcements.take()
    assert task is not None
    task.on_failed(OutOfMemory("no room"))
    assert "model not warmed up label=a code=out_of_memory: no room" in caplog.text
