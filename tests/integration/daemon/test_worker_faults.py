"""Workers that die, hang, refuse or never start: typed errors, limited restarts, components mapped again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from xditd.ipc.replies import Failed, Generated, LogLines, Queued, Returned, StepDone
from xditd.ipc.requests import Cancel, GetLogs, Lend, ReturnLoan
from xditd.ipc.status import GroupState, LeaseState


def rebuilt(starts: int) -> Any:
    return lambda status: status.counters.group_starts == starts and status.group_state is GroupState.READY


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_group_killed_in_mid_job_is_rebuilt_with_its_loans(start_daemon: Any, memory: Any, wait_until: Any) -> None:
    client = start_daemon().ready_client()
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, steps=1000))
    client.wait_event(running, StepDone)
    waiting = client.send(memory.generate(lent.component_id))
    pids = [worker.pid for worker in client.status().workers]
    os.kill(pids[0], signal.SIGKILL)
    lost = client.wait(running)
    assert isinstance(lost, Failed)
    assert lost.code == "workers_lost"
    assert "the same request may be sent again" in lost.detail
    assert isinstance(client.wait(waiting), Generated)  # it waited for the rebuilt group
    client.ask(memory.generate(lent.component_id), Generated)
    status = client.status()
    assert status.counters.group_starts == 2
    assert [worker.loaded for worker in status.workers] == [1, 1]
    assert not {worker.pid for worker in status.workers} & set(pids)
    wait_until(lambda: all(is_gone(pid) for pid in pids))


def test_killed_leader_takes_its_ranks_along(start_daemon: Any, wait_until: Any) -> None:
    client = start_daemon().ready_client()
    pids = [worker.pid for worker in client.status().workers]
    leader = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(leader, signal.SIGKILL)
    client.wait_status(rebuilt(2))
    assert all(is_gone(pid) for pid in [leader, *pids])  # before the next group started


def test_stopped_ranks_are_ended_at_the_deadline(start_daemon: Any, memory: Any) -> None:
    client = start_daemon(hang_deadline_s=0.3).ready_client()
    lent = client.lend(memory.manifest())
    pids = [worker.pid for worker in client.status().workers]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    failed = client.fail(memory.generate(lent.component_id))
    assert failed.code == "workers_lost"
    assert "no report for" in failed.detail
    client.wait_status(rebuilt(2))
    assert all(is_gone(pid) for pid in pids)
    client.ask(memory.generate(lent.component_id), Generated)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_stops_in_mid_job_is_noticed_by_the_measured_pace(start_daemon: Any, memory: Any, rank: int) -> None:
    # Only the learned step deadline can end this within the test's deadline.
    client = start_daemon(step_deadline_s=0.4, hang_deadline_s=120).ready_client()
    lent = client.lend(memory.manifest())
    client.ask(memory.generate(lent.component_id, steps=3), Generated)
    running = client.send(memory.generate(lent.component_id, steps=30))
    client.wait_event(running, StepDone)
    stopped = client.status().workers[rank].pid
    os.kill(stopped, signal.SIGSTOP)
    failed = client.wait(running)
    assert failed.code == "workers_lost"
    assert "no report for" in failed.detail
    client.wait_status(rebuilt(2))
    assert is_gone(stopped)
    client.ask(memory.generate(lent.component_id), Generated)


def test_refused_job_leaves_the_next_of_its_kind_all_of_its_time(start_daemon: Any, memory: Any, fake: Any) -> None:
    # A refusal takes milliseconds, and a first step longer than any step that was measured may.
    client = start_daemon(worker_flags=["--step-s", "1.0"], step_deadline_s=0.2, hang_deadline_s=120).ready_client()
    lent = client.lend(memory.manifest())
    assert client.fail(memory.generate(lent.component_id, seed=int(fake.Fault.REFUSE), steps=1)).code == "bad_request"
    client.ask(memory.generate(lent.component_id, steps=1), Generated)
    assert client.status().counters.group_starts == 1


def test_job_that_ignores_its_cancel_is_ended(start_daemon: Any, memory: Any, fake: Any) -> None:
    client = start_daemon(step_deadline_s=0.4, hang_deadline_s=1.0).ready_client()
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, seed=int(fake.Fault.DEAF)))
    client.wait_event(running, StepDone)
    client.send(Cancel(request_id="", target_request_id=running))
    assert client.wait(running).code == "cancelled"
    client.wait_status(rebuilt(2))
    client.ask(memory.generate(lent.component_id), Generated)


def test_stopped_rank_that_is_to_map_is_ended_at_the_deadline_of_lends(start_daemon: Any, memory: Any) -> None:
    client = start_daemon(lend_deadline_s=0.4).ready_client()
    os.kill(client.status().workers[1].pid, signal.SIGSTOP)
    failed = client.fail(Lend(request_id="", manifest=memory.manifest()))
    assert failed.code == "workers_lost"
    assert "Prepare ran; ranks [1] have not answered" in failed.detail
    client.wait_status(rebuilt(2))
    client.lend(memory.manifest())


def test_faults_of_a_job_end_that_job_alone(start_daemon: Any, memory: Any, fake: Any) -> None:
    client = start_daemon(hang_deadline_s=0.3).ready_client()
    lent = client.lend(memory.manifest())
    expected = {
        fake.Fault.REFUSE: ("bad_request", 1),
        fake.Fault.CRASH: ("workers_lost", 2),
        fake.Fault.HANG: ("workers_lost", 3),
        fake.Fault.FATAL: ("internal", 4),
    }
    for fault, (code, starts) in expected.items():
        failed = client.fail(memory.generate(lent.component_id, seed=int(fault)))
        assert failed.code == code, fault
        client.ask(memory.generate(lent.component_id), Generated)
        assert client.status().counters.group_starts == starts, fault
    assert client.status().counters.jobs_failed == 4


def test_rank_that_cannot_unmap_is_ended(start_daemon: Any, memory: Any, fake: Any) -> None:
    client = start_daemon().ready_client()
    other = client.lend(memory.manifest())
    stuck = client.lend(memory.manifest(label=fake.STUCK_LABEL, kind="vae"))
    # Returned is true: the processes that mapped it are gone.
    client.ask(ReturnLoan(request_id="", component_id=stuck.component_id), Returned)
    client.wait_status(rebuilt(2))
    client.ask(memory.generate(other.component_id), Generated)


def is_running(pid: int) -> bool:
    """Whether a process exists that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def stop_leader(client: Any) -> list[int]:
    """Stop the leader, so that an ended group's processes stay until the daemon kills them; returns the ranks' pids."""
    pids = [worker.pid for worker in client.status().workers]
    os.kill(int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGSTOP)
    return pids


def test_return_waits_for_the_processes_of_an_ended_group(start_daemon: Any, memory: Any, fake: Any) -> None:
    client = start_daemon(hang_deadline_s=0.5).ready_client()
    first, second = client.lend(memory.manifest()), client.lend(memory.manifest(kind="vae"))
    ranks = stop_leader(client)
    running = client.send(memory.generate(first.component_id, seed=int(fake.Fault.HANG)))
    client.wait_status(lambda status: status.group_state is GroupState.BUSY)
    queued = client.send(ReturnLoan(request_id="", component_id=second.component_id))
    assert client.wait(running).code == "workers_lost"
    late = client.send(ReturnLoan(request_id="", component_id=first.component_id))
    for request_id in (queued, late):
        assert isinstance(client.wait(request_id), Returned)
        assert not any(map(is_running, ranks))


def test_return_while_the_group_starts_again_is_answered_at_once(start_daemon: Any, memory: Any) -> None:
    """The new processes have nothing mapped yet."""
    client = start_daemon(worker_flags=["--late-s", "1"]).ready_client()
    lent = client.lend(memory.manifest())
    os.kill(client.status().workers[1].pid, signal.SIGKILL)
    client.wait_status(lambda status: status.group_state is GroupState.STARTING and status.counters.group_starts == 2)
    client.ask(ReturnLoan(request_id="", component_id=lent.component_id), Returned)
    assert client.status().group_state is GroupState.STARTING
    assert client.status().components == ()


def test_lost_lend_fails_after_the_processes_of_its_group_ended(start_daemon: Any, memory: Any, fake: Any) -> None:
    """The client frees the memory then."""
    client = start_daemon(lend_deadline_s=0.3).ready_client()
    ranks = stop_leader(client)
    failed = client.fail(Lend(request_id="", manifest=memory.manifest(label=f"{fake.DEADLY_LABEL} now")))
    assert failed.code == "workers_lost"
    assert not any(map(is_running, ranks))


def test_loan_whose_memory_is_gone_ends_at_the_rebuild(start_daemon: Any, memory: Any) -> None:
    client = start_daemon().ready_client()
    kept = client.lend(memory.manifest())
    other = type(memory)()
    lost = client.lend(other.manifest(kind="vae"))
    other.close()
    os.kill(client.status().workers[1].pid, signal.SIGKILL)
    client.wait_status(rebuilt(2))
    client.ask(memory.generate(kept.component_id), Generated)
    assert [component.component_id for component in client.status().components] == [kept.component_id]
    logs = client.ask(GetLogs(request_id=""), LogLines)
    assert any(f"loan ended component_id={lost.component_id}" in line for line in logs.lines)


def test_loan_that_kills_every_group_ends(start_daemon: Any, memory: Any, fake: Any) -> None:
    client = start_daemon().ready_client()
    good = client.lend(memory.manifest())
    client.lend(memory.manifest(label=fake.DEADLY_LABEL, kind="vae"))  # kills each group but the first
    os.kill(client.status().workers[0].pid, signal.SIGKILL)
    status = client.wait_status(lambda status: len(status.components) == 1)
    assert status.counters.group_starts <= 4
    client.ask(memory.generate(good.component_id), Generated)
    assert client.status().components[0].state is LeaseState.LENT


def test_lend_that_kills_the_group_fails(start_daemon: Any, memory: Any, fake: Any) -> None:
    client = start_daemon().ready_client()
    failed = client.fail(Lend(request_id="", manifest=memory.manifest(label=fake.DEADLY_LABEL + " now")))
    assert failed.code == "workers_lost"
    status = client.wait_status(rebuilt(2))
    assert status.components == ()


def test_configuration_error_is_not_tried_again(start_daemon: Any, memory: Any) -> None:
    client = start_daemon(worker_flags=["--exit-status", "2"]).client()
    status = client.wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert status.group_detail == "attention backend warp: not installed; use auto"
    assert status.counters.group_starts == 1
    failed = client.fail(Lend(request_id="", manifest=memory.manifest()))
    assert failed.code == "workers_unavailable"
    assert "attention backend warp" in failed.detail
    assert "restart the daemon" in failed.detail


def test_restarts_are_bounded(start_daemon: Any, memory: Any) -> None:
    client = start_daemon(worker_flags=["--exit-status", "1"], max_restarts=1).client()
    waiting = client.send(Lend(request_id="", manifest=memory.manifest()))
    failed = client.wait(waiting)
    assert failed.code == "workers_unavailable"
    assert "failed 2 times in a row" in failed.detail
    status = client.status()
    assert (status.group_state, status.counters.group_starts) == (GroupState.GIVEN_UP, 2)


def test_start_deadline(start_daemon: Any) -> None:
    client = start_daemon(worker_flags=["--never-ready"], start_deadline_s=0.3, max_restarts=0).client()
    status = client.wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert "only 0 ranks reported within" in status.group_detail


def test_missing_worker_program_is_named(start_daemon: Any) -> None:
    client = start_daemon(command=["/nowhere/python"]).client()
    status = client.wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert "/nowhere/python" in status.group_detail


def test_request_waits_for_workers_that_start(start_daemon: Any, memory: Any) -> None:
    client = start_daemon(worker_flags=["--late-s", "0.5"]).client()
    lending = client.send(Lend(request_id="", manifest=memory.manifest()))
    queued = client.wait_event(lending, Queued)
    assert queued.reason == "workers are starting"
    client.wait(lending)


@pytest.mark.parametrize("fault", ["CRASH", "FATAL"])
def test_served_jobs_clear_the_count_of_restarts(start_daemon: Any, memory: Any, fake: Any, fault: str) -> None:
    client = start_daemon(max_restarts=1).ready_client()
    lent = client.lend(memory.manifest())
    for starts in (2, 3):
        client.fail(memory.generate(lent.component_id, seed=int(fake.Fault[fault])))
        client.ask(memory.generate(lent.component_id), Generated)
        assert client.status().counters.group_starts == starts


def test_refused_job_does_not_clear_the_count_of_restarts(start_daemon: Any, memory: Any, fake: Any) -> None:
    # A call that kills every group: each rebuilt one first refuses it, because the kept tensors were lost.
    client = start_daemon(max_restarts=1).ready_client()
    lent = client.lend(memory.manifest())
    for fault, code in (("CRASH", "workers_lost"), ("REFUSE", "bad_request"), ("CRASH", "workers_lost")):
        assert client.fail(memory.generate(lent.component_id, seed=int(fake.Fault[fault]))).code == code
    status = client.wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert status.counters.group_starts == 2
