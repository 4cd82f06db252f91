"""Sessions: who may open one, and what ends with it."""

from __future__ import annotations

import itertools
import os
import resource
import socket
from typing import Any

from xditd.ipc.codec import encode
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.replies import Called, Failed, Farewell, Generated, LogLines, Queued, StepDone, Welcome
from xditd.ipc.requests import GetLogs, GetStatus, Goodbye
from xditd.ipc.status import JobState


def test_hello_is_answered_with_who_answers(client: Any, shared_daemon: Any) -> None:
    welcome = client.ask(client.hello(), Welcome)
    assert welcome.daemon_pid == shared_daemon.process.pid
    assert welcome.protocol_version == PROTOCOL_VERSION
    assert welcome.world_size == 2


def test_another_protocol_version_is_refused_with_both_numbers(shared_daemon: Any) -> None:
    client = shared_daemon.client(says_hello=False)
    failed = client.fail(client.hello(protocol_version=999))
    assert failed.code == "protocol_mismatch"
    assert "999" in failed.detail
    assert f"daemon {PROTOCOL_VERSION} " in failed.detail


def test_nothing_is_served_before_hello(shared_daemon: Any) -> None:
    client = shared_daemon.client(says_hello=False)
    failed = client.fail(GetStatus(request_id=""))
    assert failed.code == "session_lost"
    assert "hello" in failed.detail


def test_goodbye_ends_the_loans(shared_daemon: Any, memory: Any) -> None:
    leaving, staying = shared_daemon.ready_client(), shared_daemon.client()
    leaving.lend(memory.manifest())
    assert len(staying.status().components) == 1
    leaving.ask(Goodbye(request_id=""), Farewell)
    status = staying.status()
    assert status.components == ()
    assert [worker.loaded for worker in status.workers] == [0, 0]
    assert leaving.fail(GetStatus(request_id="")).code == "session_lost"


def test_goodbye_ends_what_is_under_way_with_an_answer(shared_daemon: Any, memory: Any) -> None:
    client = shared_daemon.ready_client()
    component_id = client.lend(memory.manifest()).component_id
    running = client.send(memory.generate(component_id, steps=1000))
    client.wait_event(running, StepDone)
    queued = client.send(memory.generate(component_id))
    client.ask(Goodbye(request_id=""), Farewell)
    for request_id in (queued, running):
        assert client.wait(request_id).code == "lease_lost"
    assert client.ended[-3:-1] == [queued, running]  # and the farewell came last


def test_killed_client_loses_its_loan(client: Any, shared_daemon: Any, start_lender: Any) -> None:
    lender, component_id = start_lender(shared_daemon)
    (component,) = client.status().components
    assert (component.component_id, component.owner_pid) == (component_id, lender.pid)
    before = client.status().clients
    lender.kill()
    status = client.wait_status(lambda status: not status.components)
    assert status.clients == before - 1


def test_client_killed_in_mid_job_frees_the_workers(
    client: Any, shared_daemon: Any, start_lender: Any, memory: Any
) -> None:
    lender, component_id = start_lender(shared_daemon, "--runs")
    (job,) = client.status().jobs
    assert (job.state, job.owner_pid, job.total_steps) == (JobState.RUNNING, lender.pid, 1000)
    failed_before = client.status().counters.jobs_failed
    waiting = client.send(memory.generate(component_id))
    client.wait_event(waiting, Queued)  # else the end of the lender may be seen first, and this one never be a job
    lender.kill()
    lost = client.wait(waiting)
    assert isinstance(lost, Failed)
    assert lost.code == "lease_lost"
    assert f"client (pid {lender.pid}) is gone" in lost.detail
    client.wait_status(lambda status: not status.components and not status.jobs)
    assert client.status().counters.jobs_failed == failed_before + 2
    own = client.lend(memory.manifest())
    client.ask(memory.generate(own.component_id), Generated)


def test_two_connections_of_a_process_are_two_sessions(client: Any, shared_daemon: Any) -> None:
    before = client.status().clients
    second = shared_daemon.client()
    assert second.status().clients == before + 1
    second.ask(Goodbye(request_id=""), Farewell)
    assert client.status().clients == before


def test_workers_keep_something_for_a_process_until_its_last_session_ends(start_daemon: Any, memory: Any) -> None:
    daemon = start_daemon()
    busy, idle = daemon.ready_client(), daemon.client()
    lent = busy.lend(memory.manifest())
    busy.ask(memory.call(lent.component_id, 1), Called)
    for last in (busy, idle):
        assert [worker.memory_bytes % 1000 for worker in idle.status().workers] == [1, 1]  # one client known
        last.ask(Goodbye(request_id=""), Farewell)
    daemon.client().wait_status(lambda status: [worker.memory_bytes for worker in status.workers] == [0, 0])


def test_client_that_stops_reading_is_dropped_and_holds_nobody(client: Any, shared_daemon: Any) -> None:
    before = client.status().clients
    silent = shared_daemon.client(receive_limit=1)
    request = encode(GetLogs(request_id="x"))
    sent = 0
    while client.status().clients == before + 1:
        for _ in range(64):
            if silent.socket.poll(0, 2):  # zmq.POLLOUT: also its own sending queue is bounded
                silent.socket.send(request)
                sent += 1
        assert sent < 100_000
    assert client.status().clients == before
    assert "does not read its replies" in shared_daemon.log
    assert len(os.listdir(f"/proc/{shared_daemon.process.pid}/fd")) < 200


def test_a_thousand_connections_do_not_use_up_the_descriptors(start_daemon: Any) -> None:
    """libzmq aborts the process without a free descriptor for a connection; the usual soft limit is 1,024."""
    daemon = start_daemon(before=["prlimit", "--nofile=64:4096", "--"])
    client = daemon.ready_client()
    strangers = []
    for _ in range(1000):
        strangers.append(socket.socket(socket.AF_UNIX))
        strangers[-1].connect(str(daemon.runtime.client_socket))
    assert client.status().clients == 1
    for stranger in strangers:
        stranger.close()
    client.status()


def test_clients_that_only_look_leave_no_line_in_the_log(start_daemon: Any) -> None:
    daemon = start_daemon()
    client = daemon.ready_client()
    before = client.ask(GetLogs(request_id=""), LogLines)
    for _ in range(20):
        looking = daemon.client()
        looking.status()
        looking.ask(Goodbye(request_id=""), Farewell)
    after = client.ask(GetLogs(request_id="", after_line=before.next_line), LogLines)
    assert after.lines == ()
    assert any("2 workers ready" in line for line in before.lines)


def test_no_descriptor_for_a_session_is_a_typed_busy(start_daemon: Any, wait_until: Any) -> None:
    """The connection exists already, but there is no descriptor for the pidfd of its process."""
    daemon = start_daemon()
    daemon.ready_client()
    pid = daemon.process.pid

    def open_files() -> set[int]:
        return {int(name) for name in os.listdir(f"/proc/{pid}/fd")}

    before = len(open_files())
    stranger = daemon.client(says_hello=False)
    wait_until(lambda: len(open_files()) > before)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    lowest_free = next(number for number in itertools.count() if number not in open_files())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    failed = stranger.fail(stranger.hello())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert failed.code == "busy"
    assert "raise the limit on open files" in failed.detail
    stranger.ask(stranger.hello(), Welcome)
