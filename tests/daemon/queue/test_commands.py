from __future__ import annotations

import pytest

from xditd.daemon.groups.ranks import first_failure
from xditd.daemon.queue.commands import MAX_PHASES, expect, slowest_ms
from xditd.ipc.errors import Internal, OtherRankFailed
from xditd.ipc.worker_messages import Done, IoDigested, RankFailed, RankTally


def done(rank: int) -> Done:
    return Done(group_token="token123", rank=rank, op_number=1, timings_ms={"x": rank + 1.0}, tally=RankTally())


def refused(rank: int, code: str = "bad_checkpoint") -> RankFailed:
    return RankFailed(group_token="token123", rank=rank, op_number=1, code=code, detail=f"of {rank}", is_fatal=False)


def test_answer_of_the_wrong_kind_is_a_defect() -> None:
    with pytest.raises(Internal, match="answered Done, Done where IoDigested"):
        expect([done(0), done(1)], IoDigested)


def test_cause_speaks_before_those_who_only_heard_of_it() -> None:
    assert first_failure([done(0), done(1)]) is None
    found = first_failure([refused(0, OtherRankFailed.code), refused(1), refused(2)])
    assert found is not None
    assert found.rank == 1


def test_timings_are_the_slowest_and_fit_into_a_message() -> None:
    assert slowest_ms([{"a": 1.0, "b": 5.0}, {"a": 2.0}]) == {"a": 2.0, "b": 5.0}
    assert len(slowest_ms([{str(number): 1.0 for number in range(64)}, {"x": 1.0}])) == MAX_PHASES
