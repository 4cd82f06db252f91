from __future__ import annotations

from typing import Any

import pytest

from xditd.daemon.groups.ranks import first_failure
from xditd.daemon.queue.commands import MAX_PHASES, Errand, ErrandRunner, Script, expect, slowest_ms
from xditd.ipc.errors import BadCheckpoint, Internal, OtherRankFailed, WorkersLost, XditdError
from xditd.ipc.worker_messages import CanaryRead, Done, Plug, RankFailed, RankTally, Unmap


class RecordingGroup:
    """Takes the place of the supervisor: notes what is told, answers when the test says so."""

    def __init__(self) -> None:
        self.is_idle = True
        self.told: list[Any] = []
        self.ended: XditdError | None = None

    def tell(self, make: Any) -> None:
        self.is_idle = False
        self.told.append(make(len(self.told) + 1))

    def end(self, error: XditdError) -> None:
        self.ended = error


def done(rank: int) -> Done:
    return Done(group_token="token123", rank=rank, op_number=1, timings_ms={"x": rank + 1.0}, tally=RankTally())


def refused(rank: int, code: str = "bad_checkpoint") -> RankFailed:
    return RankFailed(group_token="token123", rank=rank, op_number=1, code=code, detail=f"of {rank}", is_fatal=False)


class Bench:
    def __init__(self, *scripts: Script[str]) -> None:
        self.group = RecordingGroup()
        self.results: list[Any] = []
        errands = [Errand(script, self.results.append, self.results.append) for script in scripts]
        self.runner = ErrandRunner(self.group, lambda: errands.pop(0) if errands else None)  # type: ignore[arg-type]
        self.runner.advance()

    def answer(self, *answers: Any) -> None:
        self.group.is_idle = True
        self.runner.answered(self.group.told[-1], answers)
        self.runner.advance()


def plug_twice(log: list[str]) -> Script[str]:
    try:
        yield lambda number: Plug(op_number=number, component_id="a")
        yield lambda number: Plug(op_number=number, component_id="b")
    except BadCheckpoint as error:
        log.append(error.detail)
        yield lambda number: Unmap(op_number=number, component_id="a")
        raise
    finally:
        log.append("finally")
    return "plugged"


def test_commands_go_one_after_the_other_and_errands_too() -> None:
    log: list[str] = []
    bench = Bench(plug_twice(log), plug_twice(log))
    for expected in range(1, 5):
        assert len(bench.group.told) == expected
        bench.answer(done(0), done(1))
    assert bench.results == ["plugged", "plugged"]
    assert bench.runner.current is None


def test_refusal_is_raised_in_the_script_which_cleans_up_first() -> None:
    log: list[str] = []
    bench = Bench(plug_twice(log))
    bench.answer(done(0), refused(1))
    assert log == ["of 1"]
    assert isinstance(bench.group.told[-1], Unmap)
    assert bench.results == []
    bench.answer(done(0), done(1))
    assert isinstance(bench.results[0], BadCheckpoint)


def test_lost_group_closes_the_script() -> None:
    log: list[str] = []
    bench = Bench(plug_twice(log))
    lost = WorkersLost("gone")
    bench.runner.group_ended(lost)
    assert log == ["finally"]
    assert bench.results == [lost]
    assert bench.runner.current is None


def test_rank_that_cannot_unmap_ends_the_group() -> None:
    bench = Bench(plug_twice([]))
    bench.answer(refused(0), refused(1))
    bench.answer(done(0), refused(1))
    assert isinstance(bench.group.ended, Internal)
    assert "rank 1 could not unmap" in bench.group.ended.detail


def test_errand_that_needs_no_command_ends_at_once() -> None:
    def nothing() -> Script[str]:
        return "at once"
        yield

    bench = Bench(nothing(), plug_twice([]))
    assert bench.results == ["at once"]
    assert len(bench.group.told) == 1


def test_answer_of_the_wrong_kind_is_a_defect() -> None:
    with pytest.raises(Internal, match="answered Done, Done where CanaryRead"):
        expect([done(0), done(1)], CanaryRead)


def test_cause_speaks_before_those_who_only_heard_of_it() -> None:
    assert first_failure([done(0), done(1)]) is None
    found = first_failure([refused(0, OtherRankFailed.code), refused(1), refused(2)])
    assert found is not None
    assert found.rank == 1


def test_timings_are_the_slowest_and_fit_into_a_message() -> None:
    assert slowest_ms([{"a": 1.0, "b": 5.0}, {"a": 2.0}]) == {"a": 2.0, "b": 5.0}
    assert len(slowest_ms([{str(number): 1.0 for number in range(64)}, {"x": 1.0}])) == MAX_PHASES
