"""Workers, leader and daemon that are killed or stopped: a typed end in time, and a group that works again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from running_daemon import RunningDaemon

from xditd.client import Client, DaemonStopping, DaemonUnreachable, Loan, WorkersLost
from xditd.client.demo.flux1_calls import Flux1Calls
from xditd.ipc import limits
from xditd.ipc.status import GroupState, JobState, LeaseState

HANG_DEADLINE_S = 4.0
DRAIN_DEADLINE_S = 2.0
KILLED = "(?s)(was killed by SIGKILL|another rank is gone).*the same request may be sent again"
"""What the error says, by who noticed first: the group's leader, or a rank that waited for the killed one."""
NOTICED_S = 60.0
"""Within this a busy machine says that a process was killed; a rank that hangs is ended after 300 s."""
CALL_DEADLINE_S = 120.0
"""A call that never ends fails its test instead of blocking the thread that waits for it."""


@pytest.fixture
def long_job(client, transformer, make_inputs):
    """Start a job that nothing but a fault ends, and wait until it runs."""

    def start(by: Client = client, loan=transformer):
        inputs = make_inputs()
        job = by.generate(loan, inputs.conditioning, height=128, width=128, steps=1000, seed=1)
        events = iter(job)
        next(events)
        return job, events  # the iterator is kept: dropping it cancels its job

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim", [*(pytest.param(rank, marks=pytest.mark.long) for rank in ("rank 0", "rank 1")), "leader"]
)
def test_a_killed_worker_or_leader(victim, client, daemon, long_job, good_job, processes):
    status = client.status()
    ranks = [worker.pid for worker in status.workers]
    pid = processes.parent_of(ranks[0]) if victim == "leader" else ranks[int(victim[-1])]
    job, _events = long_job()
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkersLost):
        job.result()
    assert time.monotonic() - began < NOTICED_S
    good_job()  # waits for the new group, in which the loan was mapped again
    # Whoever noticed first: the log says who was killed, and by what.
    who = "the group's leader" if victim == "leader" else victim
    assert f"{who} was killed by SIGKILL" in daemon.log_text()
    after = client.status()
    assert after.counters.group_starts == status.counters.group_starts + 1
    assert not set(ranks) & {worker.pid for worker in after.workers}
    assert not any(processes.is_running(rank) for rank in ranks)


@pytest.mark.long
@pytest.mark.slow
def test_a_worker_killed_while_idle(client, good_job, processes, wait_until):
    before = client.status()
    ranks = [worker.pid for worker in before.workers]
    os.kill(ranks[1], signal.SIGKILL)
    wait_until(lambda: client.status().group_state is not GroupState.READY, "the daemon to notice")
    good_job()  # waits for the rebuild, and hears nothing else of it
    assert client.status().counters.group_starts == before.counters.group_starts + 1
    assert not any(processes.is_running(rank) for rank in ranks)


@pytest.fixture
def two_parts(make_inputs) -> Callable[[Client, Loan], list[dict[str, Any]]]:
    """Make the two parts of one step: prompts of different lengths, which the workers keep, for the same latents."""

    def make(client: Client, loan: Loan) -> list[dict[str, Any]]:
        calls = Flux1Calls(client, loan)
        long, short = (make_inputs(tokens=tokens, pixels=384, seed=tokens) for tokens in (16, 9))
        prompts = [calls.keep(each.prompt_embeds, each.pooled_prompt_embeds) for each in (long, short)]
        return [calls.arguments(long.noise, 0.5, [prompt]) for prompt in prompts]

    return make


@pytest.fixture
def start_call() -> Iterator[Callable[..., Future[list[Any]]]]:
    """Call in another thread."""
    with ThreadPoolExecutor(1) as thread:
        yield lambda client, *given: thread.submit(client.call_parts, *given, deadline_s=CALL_DEADLINE_S)


@pytest.fixture
def wait_call_runs(wait_until) -> Callable[..., None]:
    """Wait until the daemon says that a call runs, and for ``more``. A call that has ended fails the test."""

    def wait(client: Client, call: Future[list[Any]], more: Callable[[], bool] = lambda: True) -> None:
        def runs() -> bool:
            jobs = [(job.op, job.state) for job in client.status().jobs]
            return call.done() or (jobs == [("call", JobState.RUNNING)] and more())

        wait_until(runs, "the call to run")
        if call.done():
            pytest.fail(f"the call has ended before the fault: {call.exception()!r}")

    return wait


@pytest.fixture
def kill_in_call(two_parts, start_call, wait_call_runs, processes) -> Callable[..., None]:
    """Kill a rank in the forwards of a call; check the error, and that the same call works with the rebuilt group."""

    def kill(daemon, client: Client, loan: Loan, rank: int) -> None:
        pair = two_parts(client, loan)
        expected = client.call_parts(loan, pair)
        parts = pair * (limits.MAX_PARTS // 2)  # seconds of forwards; reading their inputs takes milliseconds
        before = client.status()
        pid = before.workers[rank].pid
        used_s, logged = processes.cpu_s(pid), len(daemon.log_text())
        call = start_call(client, loan, parts)
        wait_call_runs(client, call, lambda: processes.cpu_s(pid) > used_s + 0.3)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkersLost, match=KILLED):
            call.result()
        assert time.monotonic() - began < NOTICED_S

        results = client.call_parts(loan, parts)  # waits for the new group
        for number, (found,) in enumerate(results):
            assert torch.equal(found, expected[number % 2][0]), f"parts[{number}]"
        assert len(results) == len(parts)
        after = client.status()
        log = daemon.log_text()[logged:]
        assert f"rank {rank} was killed by SIGKILL" in log
        assert f"loan mapped again component_id={loan.component_id}" in log
        assert after.counters.group_starts == before.counters.group_starts + 1
        assert [each.state for each in after.components] == [LeaseState.LENT]
        # What the killed group kept was asked for once, and sent again without the caller.
        assert [each.code for each in after.last_errors[:2]] == ["unknown_kept", "workers_lost"]
        assert after.counters.jobs_failed == before.counters.jobs_failed + 2

    return kill


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_in_a_call_of_many_parts(rank, daemon, client, transformer, kill_in_call):
    kill_in_call(daemon, client, transformer, rank)


@pytest.mark.long
@pytest.mark.slow
def test_the_only_worker_killed_in_a_call_of_many_parts(start_daemon, files, kill_in_call):
    alone = start_daemon(1)
    alone.wait_ready()
    with alone.connect() as client, client.lend(files.transformer) as loan:
        kill_in_call(alone, client, loan, 0)
    alone.stop()


@pytest.fixture(scope="module")
def start_impatient(start_daemon) -> Iterator[Callable[[], RunningDaemon]]:
    """Return the daemon of the tests before; start one if there is none, or a test has ended it."""
    daemons: list[RunningDaemon] = []
    flags = ["--hang-deadline-s", str(HANG_DEADLINE_S), "--client-deadline-s", str(HANG_DEADLINE_S)]
    flags += ["--drain-deadline-s", str(DRAIN_DEADLINE_S)]

    def start() -> RunningDaemon:
        if not daemons or daemons[-1].process.poll() is not None:
            daemons.append(start_daemon(2, flags=flags))
            daemons[-1].wait_ready()
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()


@pytest.fixture
def impatient(start_impatient) -> RunningDaemon:
    """A daemon that gives its workers a few seconds."""
    return start_impatient()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_ended_at_the_deadline(rank, impatient, files, make_inputs, run, seed_bits, long_job):
    """The stopped rank hangs the other one in a collective."""
    with impatient.connect() as client, client.lend(files.transformer) as loan:
        assert torch.equal(run(client, loan, make_inputs(seed=5)), seed_bits)
        job, _events = long_job(client, loan)
        began = time.monotonic()
        os.kill(client.status().workers[rank].pid, signal.SIGSTOP)
        with pytest.raises(WorkersLost, match="no report"):
            job.result()
        assert HANG_DEADLINE_S - 1 < time.monotonic() - began < HANG_DEADLINE_S + 30
        assert torch.equal(run(client, loan, make_inputs(seed=5)), seed_bits)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_in_a_call_is_ended_at_the_deadline(
    rank, impatient, files, two_parts, start_call, wait_call_runs
):
    """The rank is stopped before it can answer: the other one waits for it in a collective of the call."""
    with impatient.connect() as client, client.lend(files.transformer) as loan:
        parts = two_parts(client, loan)
        expected = client.call_parts(loan, parts)
        began = time.monotonic()
        os.kill(client.status().workers[rank].pid, signal.SIGSTOP)
        call = start_call(client, loan, parts)
        wait_call_runs(client, call)
        with pytest.raises(WorkersLost, match=r"no report for .* while Run ran; ranks \[0, 1\] have not answered"):
            call.result()
        assert HANG_DEADLINE_S - 1 < time.monotonic() - began < HANG_DEADLINE_S + 30
        for (found,), (right,) in zip(client.call_parts(loan, parts), expected, strict=True):
            assert torch.equal(found, right)


SAME_JOB_TWICE = """
    import hashlib, sys, torch
    from xditd.client import Client
    generator = torch.Generator().manual_seed(5)
    text = {
        "prompt_embeds": torch.randn(1, 16, 4096, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 768, generator=generator),
    }
    with Client(sys.argv[1], deadline_s=float(sys.argv[3])) as client, client.lend(sys.argv[2]) as loan:
        for number in range(2):
            job = client.generate(loan, text, height=128, width=128, steps=150, seed=1)
            events = iter(job)
            next(events)
            print("job", number, "runs", flush=True)
            for _ in events:
                pass
            print(hashlib.sha256(job.result().latents.numpy().tobytes()).hexdigest(), flush=True)
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_pause_of_the_whole_machine_in_mid_job_loses_nothing(impatient, files, start_script, processes, wait_until):
    """Daemon, leader, ranks and client are stopped for longer than every deadline, and go on."""
    client = start_script(SAME_JOB_TWICE, impatient.runtime_dir, files.transformer, HANG_DEADLINE_S)
    assert client.stdout.readline() == "job 0 runs\n"
    undisturbed = client.stdout.readline()
    starts = impatient.status().counters.group_starts
    assert client.stdout.readline() == "job 1 runs\n"
    everyone = [client.pid, impatient.process.pid, *processes.descendants(impatient.process.pid)]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    ends = time.monotonic() + HANG_DEADLINE_S + 2
    wait_until(lambda: time.monotonic() > ends, "every deadline to pass")
    for pid in everyone:
        os.kill(pid, signal.SIGCONT)
    assert client.stdout.readline() == undisturbed
    assert client.wait(30) == 0
    assert impatient.status().counters.group_starts == starts
    assert "stood still for" in impatient.log_text()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("number", "error"), [(signal.SIGKILL, DaemonUnreachable), (signal.SIGTERM, DaemonStopping)])
def test_a_daemon_that_ends_in_mid_job(
    number, error, impatient, start_daemon, wait_until, files, make_inputs, run, seed_bits, long_job, processes
):
    """Its workers go with it, and the next one takes over the socket and gives the same bits."""
    first = impatient
    with first.connect() as client:
        loan = client.lend(files.transformer)
        job, _events = long_job(client, loan)
        workers = processes.descendants(first.process.pid)
        assert len(workers) >= 3
        began = time.monotonic()
        first.process.send_signal(number)
        with pytest.raises(error):
            job.result()
        assert time.monotonic() - began < DRAIN_DEADLINE_S + 30  # a told daemon lets a job run on for so long
        assert first.process.wait(timeout=30) == (-number if number == signal.SIGKILL else 0)
        wait_until(lambda: not any(processes.is_running(pid) for pid in workers), "the workers to go with the daemon")
    assert (first.runtime_dir / "daemon.sock").exists() is (number == signal.SIGKILL)
    second = start_daemon(2, folder=first.runtime_dir.parent)
    with second.connect() as client, client.lend(files.transformer) as loan:
        assert torch.equal(run(client, loan, make_inputs(seed=5)), seed_bits)
    second.stop()


def test_a_second_daemon_is_refused(daemon, client):
    second = subprocess.run(
        [sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(daemon.runtime_dir), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 1
    assert str(daemon.process.pid) in second.stderr
    assert client.status().group_state is GroupState.READY


def test_no_daemon(tmp_path):
    with pytest.raises(DaemonUnreachable, match=str(tmp_path)):
        Client(tmp_path)
