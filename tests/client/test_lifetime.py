"""Clients without references: their loans end, with a warning, and nothing blocks."""

import gc
import os
import threading
import warnings

import pytest

torch = pytest.importorskip("torch")

from xditd.client import Client  # noqa: E402
from xditd.ipc.errors import Closed  # noqa: E402
from xditd.ipc.replies import Generated  # noqa: E402
from xditd.ipc.requests import Cancel, Generate, Goodbye  # noqa: E402

TEXT = {"prompt_embeds": torch.zeros(1, 2, 8), "pooled_prompt_embeds": torch.zeros(1, 4)}


def weights():
    return {"double_blocks.0.img_mlp.0.weight": torch.ones(3, 4)}


def connection_threads():
    return [thread for thread in threading.enumerate() if thread.name == "xditd-connection"]


def test_a_client_without_references_ends_its_loans_and_warns(daemon, folder, wait_until, open_memfds, open_fds):
    gc.collect()
    before = open_memfds(), open_fds()
    client = Client(folder)
    loan = client.lend(weights())
    with pytest.warns(ResourceWarning, match=rf"a Client of {folder} was not closed: its loans end now"):
        del client
    daemon.wait_for(Goodbye)
    wait_until(lambda: not connection_threads())
    with pytest.raises(Closed, match="was not closed before it was garbage-collected; make a new Client"):
        loan.adopt()
    loan.return_()
    del loan
    assert (open_memfds(), open_fds()) == before


def test_lent_memory_stays_until_the_workers_have_unmapped_it(daemon, folder, wait_until, open_memfds):
    gc.collect()
    before = open_memfds()
    held, answer = threading.Event(), daemon.answers[Goodbye]

    def hold(request):
        assert held.wait(30)
        return answer(request)

    daemon.answers[Goodbye] = hold
    client = Client(folder)
    client.lend(weights())
    with pytest.warns(ResourceWarning):
        del client  # returns at once, though the daemon does not answer yet
    gc.collect()
    assert open_memfds() > before
    held.set()
    wait_until(lambda: open_memfds() == before)


def test_a_closed_client_does_not_warn(daemon, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client = Client(folder)
        client.close()
        del client
        gc.collect()
    assert len(daemon.requests(Goodbye)) == 1


def test_a_running_job_keeps_its_client_alive(daemon, folder, wait_until):
    daemon.answers[Generate] = lambda request: []
    job = Client(folder).generate("c1", TEXT, height=32, width=32, steps=1)
    gc.collect()
    request = daemon.wait_for(Generate)
    daemon.send(Generated(request_id=request.request_id, timings_ms={}))
    with pytest.warns(ResourceWarning):
        assert job.result().latents.shape == (1, 16, 4, 4)
    wait_until(lambda: not connection_threads())


def test_a_client_and_its_job_without_references_both_end(daemon, folder, wait_until):
    daemon.answers[Generate] = lambda request: []
    job = Client(folder).generate("c1", TEXT, height=32, width=32, steps=1)
    daemon.wait_for(Generate)
    with pytest.warns(ResourceWarning):
        del job
    daemon.wait_for(Cancel)
    daemon.wait_for(Goodbye)
    wait_until(lambda: not connection_threads())


def test_the_collector_may_run_while_a_lock_of_ours_is_held(daemon, folder, wait_until):
    """It runs at any allocation in any thread; finalizing a client in a reference cycle must not block there."""
    client = Client(folder)
    io, lifetime = client._current().connection._io, client._lifetime
    cycle = [client]
    cycle.append(cycle)
    del client
    with warnings.catch_warnings(record=True) as caught, io._lock, lifetime._lock:
        warnings.simplefilter("always")
        del cycle
        gc.collect()
    assert [warning.category for warning in caught] == [ResourceWarning]
    io.run_soon(lambda: None)  # wake the thread, as any other use of the connection does
    daemon.wait_for(Goodbye)
    wait_until(lambda: not io.thread.is_alive())


def test_a_daemon_that_does_not_answer_blocks_only_until_a_deadline(daemon, folder, wait_until, monkeypatch):
    monkeypatch.setattr("xditd.client.session._FAREWELL_DEADLINE_S", 0.05)
    daemon.answers[Goodbye] = lambda request: []
    client = Client(folder)
    io = client._current().connection._io
    io.start_beating(0.05)  # the deadline is checked with each beat
    with pytest.warns(ResourceWarning):
        del client
    wait_until(lambda: not io.thread.is_alive())


def test_a_client_whose_daemon_has_exited_frees_its_memory(daemon, folder, open_memfds, wait_until):
    gc.collect()
    before = open_memfds()
    client = Client(folder)
    client.lend(weights())
    connection = client._current().connection
    connection._io.close()
    assert connection.wait_lost(5.0)
    with pytest.warns(ResourceWarning):
        del client
    assert open_memfds() == before


def test_a_fork_ends_nothing(daemon, folder):
    client = Client(folder)
    child = os.fork()
    if child == 0:
        try:
            del client
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert daemon.requests(Goodbye) == []
    client.check_memory()
    client.close()
