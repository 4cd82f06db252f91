"""Jobs that are cancelled, interrupted, silent or failed, and the blocks that they leave."""

import threading

import pytest

torch = pytest.importorskip("torch")

from generated_jobs import TEXT, step  # noqa: E402

from xditd.client import Client  # noqa: E402
from xditd.ipc.errors import BY_CODE, Cancelled, DeadlineExceeded, UnknownComponent  # noqa: E402
from xditd.ipc.replies import CancelNoted, Failed  # noqa: E402
from xditd.ipc.requests import Call, Cancel, Generate  # noqa: E402


class UserInterrupt(BaseException):
    """Like KeyboardInterrupt and ComfyUI's interrupt, not a subclass of Exception."""


def test_a_deadline_says_whether_the_daemon_was_silent(client, daemon, stalls):
    job = client.generate("c1", TEXT, height=16, width=16, steps=3, deadline_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"not done 0\.\d s after the request; last event: step 1 of 3") as told:
        job.result()
    assert "no answer" not in told.value.detail
    assert "raise the call's deadline_s" in told.value.detail
    daemon.answers[Generate] = lambda _: []
    job = client.generate("c1", TEXT, height=16, width=16, steps=3, deadline_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"no answer from the daemon for 0\.\d s, .*no event was received; see"):
        job.result()


def test_leaving_the_loop_cancels(client, daemon, stalls):
    job = client.generate("c1", TEXT, height=16, width=16, steps=4)
    for _ in job:
        break
    assert daemon.wait_for(Cancel).target_request_id == job.request_id
    with pytest.raises(Cancelled, match="cancelled by its caller"):
        job.result()


def test_an_interrupt_in_the_loop_cancels(client, daemon, stalls):
    job = client.generate("c1", TEXT, height=16, width=16, steps=4)

    def watch():
        for _ in job:
            raise UserInterrupt

    with pytest.raises(UserInterrupt):
        watch()
    assert daemon.wait_for(Cancel).target_request_id == job.request_id


def test_an_interrupt_in_a_with_block_cancels(client, daemon, stalls):
    with pytest.raises(UserInterrupt), client.generate("c1", TEXT, height=16, width=16, steps=4) as job:
        raise UserInterrupt
    assert daemon.wait_for(Cancel).target_request_id == job.request_id


def test_an_interrupt_while_waiting_cancels(client, daemon, stalls, monkeypatch):
    job = client.generate("c1", TEXT, height=16, width=16, steps=4)

    def interrupt():
        raise UserInterrupt

    monkeypatch.setattr(job._pending, "take", interrupt)
    with pytest.raises(UserInterrupt):
        job.result()
    assert daemon.wait_for(Cancel).target_request_id == job.request_id


def test_a_job_without_references_is_cancelled(client, daemon, stalls):
    client.generate("c1", TEXT, height=16, width=16, steps=4)
    daemon.wait_for(Cancel)


def test_another_thread_cancels(client, daemon, stalls):
    job = client.generate("c1", TEXT, height=16, width=16, steps=4)
    timer = threading.Timer(0.05, job.cancel)
    timer.start()
    with pytest.raises(Cancelled, match="cancelled at step 1"):
        job.result()
    assert len(daemon.requests(Cancel)) == 1


def test_a_finished_job_is_not_cancelled(client, daemon, generates):
    with client.generate("c1", TEXT, height=16, width=16, steps=1) as job:
        job.result()
    job.cancel()
    client.generate("c1", TEXT, height=16, width=16, steps=1).result()
    assert daemon.requests(Cancel) == []


def test_result_raises_the_same_error_each_time(client, daemon):
    daemon.answers[Generate] = lambda request: [
        Failed(request_id=request.request_id, code="unknown_component", detail="component c9: no such loan")
    ]
    job = client.generate("c1", TEXT, height=16, width=16, steps=1)
    with pytest.raises(UnknownComponent, match="component c9"):
        list(job)
    with pytest.raises(UnknownComponent, match="component c9"):
        job.result()


def test_silence_ends_the_wait_and_the_job(daemon, folder, stalls):
    with Client(folder, deadline_s=0.2) as client:
        job = client.generate("c1", TEXT, height=16, width=16, steps=4)
        with pytest.raises(DeadlineExceeded, match="last event: step 1 of 4"):
            job.result()
        assert daemon.wait_for(Cancel).target_request_id == job.request_id


def test_a_total_deadline_ends_a_job_that_makes_progress(client, daemon):
    daemon.answers[Generate] = lambda request: [step(request, number, 1000) for number in range(1, 4)]
    job = client.generate("c1", TEXT, height=16, width=16, steps=1000, deadline_s=0.2)
    with pytest.raises(DeadlineExceeded, match="last event: step 3 of 1000"):
        job.result()


def test_a_block_returns_to_the_pool_only_when_its_job_has_ended(client, daemon, wait_until):
    daemon.answers[Generate] = lambda request: []
    daemon.answers[Cancel] = lambda request: [CancelNoted(request_id=request.request_id)]
    first = client.generate("c1", TEXT, height=16, width=16, steps=1)
    daemon.wait_for(Generate, 1)
    with first:
        pass
    daemon.wait_for(Cancel)
    second = client.generate("c1", TEXT, height=16, width=16, steps=1)
    one, two = daemon.wait_for(Generate, 1), daemon.wait_for(Generate, 2)
    assert one.io.inode != two.io.inode  # workers may still write to the first
    daemon.send(Failed(request_id=first.request_id, code="bad_request", detail="steps: 1 is too few"))
    wait_until(lambda: any(client._pool._idle.values()))
    third = client.generate("c1", TEXT, height=16, width=16, steps=1)
    assert daemon.wait_for(Generate, 3).io.inode == one.io.inode
    second.cancel()
    third.cancel()


@pytest.mark.parametrize("code", ["workers_lost", "lease_lost", "cancelled", "out_of_memory", "internal"])
def test_a_block_that_lost_workers_may_write_to_is_not_used_again(client, daemon, code):
    """A cancelled job, or one that lost its loan, may have ended with its group, whose ranks may still run."""
    daemon.answers[Generate] = lambda request: [Failed(request_id=request.request_id, code=code, detail="gone")]
    with pytest.raises(BY_CODE[code]):
        client.generate("c1", TEXT, height=16, width=16, steps=1).result()
    assert not any(client._pool._idle.values())


def test_an_interrupted_call_is_cancelled(client, daemon):
    with pytest.raises(DeadlineExceeded):
        client.call("c1", {"hidden_states": torch.randn(1, 16, 64)}, deadline_s=0.1)
    assert daemon.wait_for(Cancel).target_request_id == daemon.requests(Call)[0].request_id
