"""``xditd status --watch`` and ``xditd top``: states again and again, rates, and daemons that restart."""

from __future__ import annotations

import json
import time

import msgspec
import pytest
from sample_status import STATUS, answers_status

from xditd.client.cli import exits
from xditd.client.cli.main import main
from xditd.client.cli.top import Rates, describe
from xditd.ipc.replies import Failed, Status
from xditd.ipc.requests import GetStatus, Hello
from xditd.ipc.status import Counters, JobState, JobStatus


@pytest.fixture
def interrupt_after(monkeypatch):
    """Press Ctrl-C after so many looks."""

    def set_looks(looks: int) -> None:
        left = [looks]

        def sleep(_: float) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        monkeypatch.setattr(time, "sleep", sleep)

    return set_looks


def job(request_id: str, step: int, ran_s: float = 1.0) -> JobStatus:
    return JobStatus(
        request_id=request_id, op="generate", state=JobState.RUNNING, owner_pid=99, step=step, total_steps=20,
        waited_s=0.0, ran_s=ran_s,
    )  # fmt: skip


def state(jobs_done: int, *jobs: JobStatus):
    return msgspec.structs.replace(STATUS, jobs=jobs, counters=Counters(jobs_done=jobs_done))


def test_status_is_watched_as_a_json_document_on_each_line(daemon, folder, capsys, interrupt_after):
    answers_status(daemon)
    interrupt_after(3)
    code = main(["status", "--runtime-dir", str(folder), "--json", "--watch", "0.1"])
    lines = capsys.readouterr().out.splitlines()
    assert code == exits.INTERRUPTED
    assert [json.loads(line)["group_state"] for line in lines] == ["busy"] * 3


def test_a_check_is_for_one_look(daemon, folder, capsys):
    answers_status(daemon)
    assert main(["status", "--runtime-dir", str(folder), "--check", "--watch", "1"]) == exits.MISUSE
    assert "leave out --watch" in capsys.readouterr().err


def test_top_shows_gpus_jobs_and_what_is_left(daemon, folder, capsys, interrupt_after):
    answers_status(daemon)
    interrupt_after(2)
    assert main(["top", "--runtime-dir", str(folder)]) == exits.INTERRUPTED
    out = capsys.readouterr().out
    for text in ("cuda:0", "3.0 GiB", "3/28", "3.3 s", "1 of at most 64", "22.0 GiB cuda_ipc"):
        assert out.count(text) >= 2, text  # of each look


@pytest.mark.parametrize("verb", [["top"], ["status", "--watch", "1"]])
def test_without_a_daemon_at_the_start_it_exits_with_3(verb, folder, capsys):
    assert main([*verb, "--runtime-dir", str(folder)]) == exits.UNREACHABLE
    assert "no such socket" in capsys.readouterr().err


def test_a_daemon_that_is_gone_is_waited_for(daemon, folder, capsys, interrupt_after):
    looks = []

    def answer(request):
        looks.append(request)
        if len(looks) == 2:
            return [Failed(request_id=request.request_id, code="daemon_unreachable", detail="it restarts")]
        return [Status(request_id=request.request_id, daemon=STATUS)]

    daemon.answers[GetStatus] = answer
    interrupt_after(4)
    assert main(["top", "--runtime-dir", str(folder)]) == exits.INTERRUPTED
    assert capsys.readouterr().out.count("cuda:0") == 3
    assert len(daemon.requests(Hello)) == 2


def test_rates_are_of_the_last_ten_seconds():
    rates = Rates()
    assert rates.text == "-"
    rates.add(state(4, job("a", 18)), 100.0)
    assert rates.text == "-"
    rates.add(state(5, job("a", 20), job("b", 2)), 102.0)
    assert rates.text == "30.0 jobs a minute, 2.00 steps a second, in the last 2.0 s"
    for second in range(103, 120):
        rates.add(state(5, job("b", second - 100)), float(second))
    assert rates.text == "0.0 jobs a minute, 1.00 steps a second, in the last 10.0 s"


def test_another_daemon_starts_anew():
    rates = Rates()
    rates.add(state(9), 1.0)
    rates.add(state(9), 2.0)
    rates.add(state(0), 3.0)
    assert rates.text == "-"


def test_what_is_left_needs_a_step():
    assert "LEFT" in describe(state(0, job("a", 0)), "-")
    (row,) = [line for line in describe(state(0, job("a", 5, ran_s=10.0)), "-").splitlines() if "5/20" in line]
    assert "30.0 s" in row
