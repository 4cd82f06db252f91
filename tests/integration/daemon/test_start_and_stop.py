"""Start and stop: one daemon for each private folder, and no processes or files after its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from xditd.ipc.replies import Failed, Generated, StepDone, Stopping
from xditd.ipc.requests import Stop
from xditd.ipc.status import GroupState


def worker_pids(client: Any) -> list[int]:
    return [worker.pid for worker in client.status().workers]


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_hello_is_answered_while_the_workers_start(start_daemon: Any) -> None:
    client = start_daemon(worker_flags=["--never-ready"]).client()
    assert client.status().group_state.value == "starting"


def test_status_has_what_idle_workers_counted_of_their_memory(start_daemon: Any) -> None:
    client = start_daemon().ready_client()
    client.wait_status(lambda status: all(worker.memory is not None for worker in status.workers))
    for worker in client.status().workers:
        assert (worker.memory.weights_bytes, worker.memory.beyond_weights_bytes) == (64, 28)


def test_a_stop_does_not_wait_for_workers_that_still_import(start_daemon: Any) -> None:
    daemon = start_daemon(worker_flags=["--imports-s", "60"])
    pids = worker_pids(daemon.ready_client())
    began = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert time.monotonic() - began < 4.0  # the grace after which ranks are killed is 5 s
    assert all(is_gone(pid) for pid in pids)


def test_second_daemon_is_refused_and_the_first_serves_on(start_daemon: Any) -> None:
    first = start_daemon()
    client = first.client()
    second = start_daemon()
    assert second.wait() == 1
    assert f"another daemon (pid {first.process.pid}) holds it" in second.log
    client.status()
    first.client().status()


def test_three_daemons_of_one_user_do_not_meet(start_daemon: Any, folder: Path, memory: Any) -> None:
    """In folders of their own: each has its workers, its loans under the same names, and its end."""
    homes = [folder / name for name in ("a", "b", "c")]
    for home in homes:
        home.mkdir()
    daemons = [start_daemon(home=home) for home in homes]
    clients = [daemon.ready_client() for daemon in daemons]
    lent = [client.lend(memory.manifest()) for client in clients]
    pids = [{worker.pid for worker in client.status().workers} for client in clients]
    assert len(set.union(*pids)) == 6
    os.kill(min(pids[0]), signal.SIGKILL)  # in one, a lost group; another stops
    daemons[1].process.send_signal(signal.SIGTERM)
    assert daemons[1].wait() == 0
    clients[0].wait_status(lambda status: status.counters.group_starts == 2 and status.group_state is GroupState.READY)
    for client, loan in ((clients[0], lent[0]), (clients[2], lent[2])):
        client.ask(memory.generate(loan.component_id), Generated)
    third = clients[2].status()
    assert (third.pid, third.counters.group_starts) == (daemons[2].process.pid, 1)
    assert {worker.pid for worker in third.workers} == pids[2]
    assert {path.name for path in homes[1].joinpath("run").iterdir()} == {"daemon.lock", "fake-starts"}


def test_socket_of_a_killed_daemon_is_taken_over(start_daemon: Any, wait_until: Any) -> None:
    first = start_daemon()
    client = first.ready_client()
    pids = worker_pids(client)
    first.process.kill()
    first.wait()
    wait_until(lambda: all(is_gone(pid) for pid in pids))  # workers die with their parent
    assert first.runtime.client_socket.exists()
    second = start_daemon()
    assert second.ready_client().status().pid == second.process.pid


def test_sockets_are_private(start_daemon: Any) -> None:
    daemon = start_daemon()
    daemon.client()
    runtime = daemon.runtime
    assert [path.stat().st_mode & 0o777 for path in (runtime.path, runtime.client_socket, runtime.worker_socket)] == [
        0o700,
        0o600,
        0o600,
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_mid_job_ends_everything_in_order(start_daemon: Any, memory: Any, number: int) -> None:
    daemon = start_daemon("--drain-deadline-s", "0.3")
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    pids = worker_pids(client)
    running = client.send(memory.generate(lent.component_id, steps=1000))
    client.wait_event(running, StepDone)
    waiting = client.send(memory.generate(lent.component_id))
    daemon.process.send_signal(number)
    for request_id in (waiting, running):
        failed = client.wait(request_id)
        assert isinstance(failed, Failed)
        assert failed.code == "daemon_stopping"
    assert daemon.wait() == 0
    assert all(is_gone(pid) for pid in pids)
    assert not daemon.runtime.client_socket.exists()
    assert not daemon.runtime.worker_socket.exists()
    assert "Traceback" not in daemon.log


def test_running_job_may_finish_and_nothing_else_gets_in(start_daemon: Any, memory: Any) -> None:
    daemon = start_daemon()
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, steps=100))
    client.wait_event(running, StepDone)
    waiting = client.send(memory.generate(lent.component_id))
    daemon.process.send_signal(signal.SIGTERM)
    failed = client.wait(waiting)  # at once, while the other one runs
    assert isinstance(failed, Failed)
    assert failed.code == "daemon_stopping"
    assert running not in client.ended
    assert client.fail(memory.generate(lent.component_id)).code == "daemon_stopping"
    assert [job.request_id for job in client.status().jobs] == [running]
    assert isinstance(client.wait(running), Generated)
    assert daemon.wait() == 0


def test_stop_request_while_the_workers_start(start_daemon: Any) -> None:
    daemon = start_daemon(worker_flags=["--never-ready"])
    daemon.client().ask(Stop(request_id=""), Stopping)
    assert daemon.wait() == 0


def test_stop_is_answered_and_new_work_refused(start_daemon: Any, memory: Any, fake: Any) -> None:
    daemon = start_daemon()
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, steps=2, seed=int(fake.Fault.DEAF)))
    client.wait_event(running, StepDone)
    client.ask(Stop(request_id=""), Stopping)
    assert client.fail(memory.generate(lent.component_id)).code == "daemon_stopping"
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.send_signal(signal.SIGINT)
    # The second of two does not wait for a job that hears no cancel. Which is the second
    # when both wait is Python's choice.
    assert daemon.wait(15.0) in (128 + signal.SIGINT, 128 + signal.SIGTERM)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--queue-limit", "many"], "flag --queue-limit = 'many': use a whole number"),
        (["--device", "tpu"], "flag --device = 'tpu'"),
        (["--config", "/nowhere/xditd.toml"], "file /nowhere/xditd.toml: No such file"),
        (["--no-such-flag"], "unrecognized arguments"),
        (["--runtime-dir", "/tmp/" + 99 * "x"], "116 bytes, at most 107 fit; choose a shorter runtime folder"),
    ],
)
def test_misuse_has_its_own_exit_status(flags: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xditd.daemon", *flags], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr


def test_folder_that_others_may_enter_is_refused(folder: Path, start_daemon: Any) -> None:
    (folder / "run").mkdir(mode=0o755)
    daemon = start_daemon()
    assert daemon.wait() == 1
    assert f"chmod 700 {folder / 'run'}" in daemon.log


def test_folder_holds_nothing_but_what_is_named(folder: Path, memory: Any, start_daemon: Any) -> None:
    client = start_daemon().ready_client()
    client.ask(memory.generate(client.lend(memory.manifest()).component_id), Generated)
    found = {path.name for path in (folder / "run").iterdir()}
    assert found == {"daemon.sock", "workers.sock", "daemon.lock", "fake-starts"}


def test_a_misspelt_variable_is_a_warning(shared_daemon: Any) -> None:
    command = [sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(shared_daemon.runtime.path)]
    environ = {**os.environ, "XDITD_QUEUE_LIMT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environ)
    assert done.returncode == 1  # the folder is taken: no more than its start is needed here
    assert "XDITD_QUEUE_LIMT: nothing reads it; did you mean XDITD_QUEUE_LIMIT?" in done.stderr
