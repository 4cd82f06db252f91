"""Loans that end while requests use them: those fail with the reason, others keep their bits, and nothing is left."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from xditd.client import Client, LeaseLost, Loan
from xditd.client.arenas import Arena
from xditd.client.demo import checkpoints
from xditd.client.demo.flux1_calls import Flux1Calls
from xditd.ipc.status import JobState

WAIT_S = 60.0
Ask = Callable[[str, Loan], torch.Tensor]
Send = Callable[[str, Loan], "Future[torch.Tensor]"]


@pytest.fixture
def other(daemon) -> Iterator[Client]:
    """Revokes what it has not lent."""
    with daemon.connect() as connected:
        yield connected


@pytest.fixture
def tuned(client, files) -> Iterator[Loan]:
    with client.lend(files.tuned, label="tuned") as loan:
        yield loan


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def ask(client, make_inputs, run) -> Ask:
    """Run a ``call`` or a ``generate`` on a loan."""
    inputs = make_inputs(seed=5)

    def do(op: str, loan: Loan) -> torch.Tensor:
        if op == "generate":
            return run(client, loan, inputs)
        return Flux1Calls(client, loan).predict(inputs.noise, 0.75, inputs.prompt)

    return do


@pytest.fixture
def send(client, threads, ask, wait_until) -> Send:
    """The same from a thread, while a rank is stopped; returns once the daemon has the request."""

    def start(op: str, loan: Loan) -> Future[torch.Tensor]:
        before = len(client.status().jobs)
        sent = threads.submit(ask, op, loan)
        wait_until(lambda: len(client.status().jobs) > before, "the daemon to have the request")
        return sent

    return start


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a rank: what the workers run does not end meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ending(way: str, loan: Loan, other: Client) -> tuple[Callable[[], None], str]:
    """How a loan ends, and what its requests are told."""
    what = f"component {loan.component_id}: "
    if way == "returned":
        return loan.return_, re.escape(f"{what}its owner took it back; lend it again")
    return lambda: other.revoke(loan), re.escape(f"{what}revoked by process {os.getpid()}; lend it again")


@pytest.mark.parametrize("way", ["returned", "revoked"])
@pytest.mark.parametrize("op", ["call", "generate"])
def test_under_a_request_that_runs_and_others_that_wait(
    op, way, client, other, transformer, tuned, files, threads, ask, send, seed_bits, wait_until
):
    right, call_bits = ask("call", tuned), ask("call", transformer)
    end, why = ending(way, tuned, other)
    with stopped(client.status().workers[1].pid):
        running = send(op, tuned)
        waiting = [send("call", tuned), send("generate", tuned)]
        served = [send("call", transformer), send("generate", transformer)]
        ended = threads.submit(end)
        for each in waiting:  # they do not wait for the one that runs
            with pytest.raises(LeaseLost, match=why):
                each.result(WAIT_S)
        wait_until(lambda: client.status().jobs[0].state is JobState.CANCELLING, "the running one to be cancelled")
        assert not any(each.done() for each in (running, ended, *served))
    with pytest.raises(LeaseLost, match=why):
        running.result(WAIT_S)
    ended.result(WAIT_S)
    assert torch.equal(served[0].result(WAIT_S), call_bits)
    assert torch.equal(served[1].result(WAIT_S), seed_bits)

    status = client.status()
    assert [component.component_id for component in status.components] == [transformer.component_id]
    assert [worker.loaded for worker in status.workers] == [1, 1]
    with pytest.raises(LeaseLost, match="lend it again"):
        ask("call", tuned)
    with client.lend(files.tuned, label="again") as again:
        tuned.return_()  # takes back nothing of the new loan of the same file
        assert torch.equal(ask("call", again), right)


@pytest.mark.parametrize("way", ["returned", "revoked"])
def test_under_requests_that_wait_for_another_loan(way, client, other, transformer, tuned, threads, send, seed_bits):
    end, why = ending(way, tuned, other)
    with stopped(client.status().workers[1].pid):
        running = send("generate", transformer)
        waiting = send("call", tuned)
        ended = threads.submit(end)
        with pytest.raises(LeaseLost, match=why):
            waiting.result(WAIT_S)
        (job,) = client.status().jobs
        assert job.state is JobState.RUNNING
        assert not ended.done()  # no rank has unmapped it yet
    assert torch.equal(running.result(WAIT_S), seed_bits)
    ended.result(WAIT_S)
    assert [worker.loaded for worker in client.status().workers] == [1, 1]


@pytest.mark.parametrize("op", ["adopt", "lend"])
def test_revoked_while_it_is_adopted_or_lent_anew(op, client, other, transformer, threads, wait_until, ask):
    """Both are commands to the workers, like jobs: neither leaves half of it there."""
    arena = Arena.copy_of(checkpoints.flux1_state_dict(2))
    loan = client.lend(arena.tensors)
    right = ask("call", loan)
    with stopped(client.status().workers[1].pid):
        if op == "adopt":
            changed = threads.submit(loan.adopt)
        else:
            changed = threads.submit(client.lend, arena.tensors, generation=1)
        wait_until(lambda: [job.state for job in client.status().jobs] == [JobState.RUNNING], "the command to run")
        revoked = threads.submit(other.revoke, loan)
        wait_until(lambda: client.status().jobs[0].state is JobState.CANCELLING, "the command to be cancelled")
        assert not revoked.done()
    with pytest.raises(LeaseLost, match=f"component {loan.component_id}: revoked by process {os.getpid()}"):
        changed.result(WAIT_S)
    revoked.result(WAIT_S)
    assert not loan.is_adopted
    assert [component.component_id for component in client.status().components] == [transformer.component_id]
    assert [worker.loaded for worker in client.status().workers] == [1, 1]
    with client.lend(arena.tensors, generation=1) as again:
        assert torch.equal(ask("call", again), right)
    loan.return_()
    arena.close()  # nothing views it any more
