"""Faults around accelerated pipelines: each is named, nothing is lost that need not be, and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_parts import embedded_call, fail, restart, same
from flux_pipelines import flux, flux_call, flux_transformer, run_plain
from pipeline_entries import PIPELINES
from running_daemon import RunningDaemon, until

from xditd.client import (
    BadRequest,
    Client,
    Closed,
    DaemonUnreachable,
    LeaseLost,
    OutOfMemory,
    Unsupported,
    accelerate,
    unaccelerate,
)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("as_many_threads_as_the_worker")]

SUPPORT = Path(__file__).parent / "support"


@pytest.fixture
def start_script() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run Python text in a process of its own that can build tiny pipelines; it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])}
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def run_with(pipe: Any, on_step: Callable[[int], object]) -> list[torch.Tensor]:
    """Run the pipeline of ``run_plain``; ``on_step`` is called between the transformer's calls."""

    def callback(_: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        on_step(step)
        return values

    return [pipe(**flux_call(callback_on_step_end=callback)).images]


# ---- Clients ----

PIPELINE_SCRIPT = """
    import sys
    from flux_pipelines import flux, flux_call
    from xditd.client import Client, accelerate

    def callback(pipe, step, timestep, values):
        print("step", flush=True)
        sys.stdin.readline()
        return values

    pipe = flux()
    with accelerate(pipe, runtime_dir=sys.argv[1]):
        image = pipe(**flux_call(callback_on_step_end=callback)).images
    print(image.double().sum().item().hex(), flush=True)
"""


def test_client_killed_in_mid_pipeline(one_worker: RunningDaemon, start_script) -> None:
    child = start_script(PIPELINE_SCRIPT, one_worker.runtime_dir)
    assert child.stdout.readline() == "step\n"
    status = one_worker.status()
    assert [each.owner_pid for each in status.components] == [child.pid]
    workers = [each.pid for each in status.workers]
    child.kill()

    def is_free() -> bool:
        status = one_worker.status()
        return not status.components and not any(each.loaded for each in status.workers)

    until(is_free, "the loans to end", one_worker.log)
    assert [each.pid for each in one_worker.status().workers] == workers
    pipe = flux()
    with one_worker.connect() as client, accelerate(pipe, client=client):
        assert same(run_plain(pipe), run_plain(flux()))


def test_two_processes_at_once(one_worker: RunningDaemon, start_script) -> None:
    children = [start_script(PIPELINE_SCRIPT, one_worker.runtime_dir) for _ in range(2)]
    for _ in range(2):  # the steps of both, in turn
        for child in children:
            assert child.stdout.readline() == "step\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
    expected = run_plain(flux())[0].double().sum().item().hex()
    for child in children:
        assert child.stdout.readline() == f"{expected}\n"
        assert child.wait() == 0


def test_threads_on_one_pipeline_and_on_two(client: Client) -> None:
    pipes = [flux(), flux()]
    expected = run_plain(flux())
    found: list[list[torch.Tensor]] = []
    transformer = pipes[0].transformer
    arguments = embedded_call()
    with torch.no_grad():
        result = transformer(**arguments)[0]
    with accelerate(pipes[0], client=client), accelerate(pipes[1], client=client) as second:

        def run(pipe: Any) -> None:
            found.append(run_plain(pipe))

        def call() -> None:
            with torch.no_grad():
                found.append([transformer(**arguments)[0]])

        # A scheduler is for one thread: two threads share a model, and each of two has a pipeline.
        threads = [threading.Thread(target=run, args=(pipe,)) for pipe in pipes]
        threads += [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert second.calls["transformer"] == 2
    assert len(found) == 5
    for each in found:
        assert same(each, expected) or same(each, [result])


@torch.no_grad()
def test_block_left_while_a_call_runs(client: Client) -> None:
    """The block waits for the call, whose result is that of the workers."""
    transformer = flux_transformer()
    expected = transformer(**embedded_call())[0]
    entered, may_go_on = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []
    fast = accelerate(transformer, client=client)
    stand_in = fast._stand_ins["FluxTransformer2DModel"]
    check = stand_in._lent.snapshot.changes

    def changes() -> list[str]:
        entered.set()
        may_go_on.wait(60)
        return check()

    stand_in._lent.snapshot.changes = changes

    def call() -> None:
        with torch.no_grad():
            found.append(transformer(**embedded_call())[0])

    caller = threading.Thread(target=call)
    caller.start()
    assert entered.wait(60)
    closer = threading.Thread(target=fast.close)
    closer.start()
    until(lambda: stand_in._is_removed, "the block to be left")
    assert closer.is_alive()
    may_go_on.set()
    caller.join()
    closer.join()
    assert torch.equal(found[0], expected)
    assert fast.calls == {"FluxTransformer2DModel": 1}
    assert torch.equal(transformer(**embedded_call())[0], expected)


@torch.no_grad()
def test_block_left_by_a_signal_handler_within_a_call(client: Client) -> None:
    """A handler runs in the thread whose call it has interrupted, and would wait for that call without end."""
    pipe = flux()
    with accelerate(pipe, client=client) as fast:
        check = fast._stand_ins["transformer"]._lent.snapshot.changes

        def changes() -> list[str]:
            for give_back in (fast.close, lambda: unaccelerate(pipe)):
                with pytest.raises(BadRequest, match="transformer: a call of it runs in this thread"):
                    give_back()
            return check()

        fast._stand_ins["transformer"]._lent.snapshot.changes = changes
        assert same(run_plain(pipe), run_plain(flux()))
        assert fast.calls == {"transformer": 2}
    assert "forward" not in vars(pipe.transformer)


class InCallbackError(Exception):
    """Raised by a callback."""


@pytest.mark.parametrize("error", [InCallbackError, KeyboardInterrupt])
def test_error_in_a_callback(client: Client, error: type[BaseException]) -> None:
    pipe = flux()

    def fail(_: int) -> None:
        raise error

    with accelerate(pipe, client=client):
        with pytest.raises(error):
            run_with(pipe, fail)
        assert same(run_plain(pipe), run_plain(flux()))


@pytest.mark.parametrize("error", [InCallbackError, KeyboardInterrupt])
def test_error_while_a_call_runs(client: Client, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is cancelled, and the objects among its arguments stay as they were."""
    entry = PIPELINES["qwen-image-21"]
    pipe = entry.build()
    expected = entry.run(entry.build())
    with accelerate(pipe, client=client) as fast:
        stand_in = fast._stand_ins["transformer"]
        with monkeypatch.context() as patch:
            patch.setattr(stand_in._lent.snapshot, "changes", lambda: fail(error))
            with pytest.raises(error):
                entry.run(pipe)
        until(lambda: not client.status().jobs or None, "the job to end")
        assert same(entry.run(pipe), expected)


def test_client_closed_inside_the_block(one_worker: RunningDaemon) -> None:
    pipe = flux()
    client = one_worker.connect()
    with accelerate(pipe, client=client):
        client.close()
        with pytest.raises(Closed):
            run_plain(pipe)
    assert same(run_plain(pipe), run_plain(flux()))


def test_nested_blocks(client: Client) -> None:
    pipe = flux()
    expected = run_plain(flux())
    with accelerate(pipe, client=client) as outer:
        with pytest.raises(Unsupported, match="transformer: it is accelerated already"):
            accelerate(pipe, client=client)
        with accelerate(pipe, components=("vae",), client=client) as inner:
            assert same(run_plain(pipe), expected)
            assert inner.calls["vae"] == 1
        assert same(run_plain(pipe), expected)
        assert outer.calls["transformer"] == 4
    assert same(run_plain(pipe), expected)


def test_fork(one_worker: RunningDaemon, start_script) -> None:
    child = start_script(
        """
        import os, sys
        from flux_pipelines import flux, run_plain
        from xditd.client import Client, Unsupported, accelerate
        pipe = flux()
        with accelerate(pipe, runtime_dir=sys.argv[1]):
            first = run_plain(pipe)[0]
            if os.fork() == 0:
                try:
                    run_plain(pipe)
                except Unsupported as error:
                    print("is a fork of it" in str(error), flush=True)
                break_out = True
            else:
                os.wait()
                break_out = False
                print((run_plain(pipe)[0] == first).all().item(), flush=True)
        # The fork has left the block too, and has not ended the other one's loan.
        if break_out:
            os._exit(0)
        print("end", flush=True)
        """,
        one_worker.runtime_dir,
    )
    assert child.stdout.read().split() == ["True", "True", "end"]


# ---- Daemons and workers ----


@pytest.mark.parametrize("force", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("when", ["between", "within"])
def test_daemon_restarted(own_daemon: RunningDaemon, start_daemon, when: str, force: bool) -> None:
    pipe = flux()
    expected = run_plain(flux())
    started: list[RunningDaemon] = []
    with own_daemon.connect() as client, accelerate(pipe, client=client) as fast:
        assert same(run_plain(pipe), expected)
        if when == "between":
            started.append(restart(own_daemon, start_daemon, force=force))
            assert same(run_plain(pipe), expected)
        else:
            on_step = lambda step: started or started.append(restart(own_daemon, start_daemon, force=force))  # noqa: E731
            assert same(run_with(pipe, on_step), expected)
        assert fast.calls["transformer"] == 4
        assert fast._stand_ins["transformer"].lends == 2
    started[0].stop()


def test_worker_killed_in_mid_call(own_daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flux()
    with own_daemon.connect() as client, accelerate(pipe, client=client) as fast:
        snapshot = fast._stand_ins["transformer"]._lent.snapshot
        unchanged = snapshot.changes
        killed: list[int] = []

        def changes() -> list[str]:
            if not killed:
                killed.append(client.status().workers[0].pid)
                os.kill(killed[0], signal.SIGKILL)
            return unchanged()

        monkeypatch.setattr(snapshot, "changes", changes)
        assert same(run_plain(pipe), run_plain(flux()))
        assert client.status().workers[0].pid != killed[0]


def test_loan_revoked_by_another_process(one_worker: RunningDaemon, client: Client) -> None:
    pipe = flux()
    with accelerate(pipe, client=client) as fast, one_worker.connect() as other:
        run_plain(pipe)
        other.revoke(fast._stand_ins["transformer"]._lent.loan.component_id)
        assert same(run_plain(pipe), run_plain(flux()))


def test_daemon_does_not_come_back(own_daemon: RunningDaemon) -> None:
    pipe = flux()
    with own_daemon.connect() as client, accelerate(pipe, client=client, wait_s=0.5):
        own_daemon.stop()
        with pytest.raises(DaemonUnreachable):
            run_plain(pipe)
    assert same(run_plain(pipe), run_plain(flux()))


@torch.no_grad()
def test_out_of_memory_in_a_worker(start_daemon) -> None:
    """An attention over many tokens, all at once: 320 GB, which the workers may not take."""
    daemon = start_daemon(1, before=("prlimit", f"--as={64 << 30}"))
    daemon.wait_ready()
    pipe = flux()
    tokens = 200_000
    many = {**embedded_call(), "hidden_states": torch.zeros(1, tokens, 16), "img_ids": torch.zeros(tokens, 3)}
    with daemon.connect() as client, accelerate(pipe, client=client):
        pid = client.status().workers[0].pid
        pipe.transformer.set_attention_backend("_native_math")
        with pytest.raises(OutOfMemory, match="transformer: no room in the worker's memory"):
            pipe.transformer(**many)
        pipe.transformer.reset_attention_backend()
        assert same(run_plain(pipe), run_plain(flux()))
        assert client.status().workers[0].pid == pid
    daemon.stop()


# ---- Caches in the workers ----


def test_cache_whose_workers_were_rebuilt(own_daemon: RunningDaemon) -> None:
    """The pipeline's call fails by name, since what its cache holds is lost; the next one has a new cache."""
    entry = PIPELINES["qwen-image-21"]
    pipe = entry.build()
    expected = entry.run(entry.build())
    with own_daemon.connect() as client, accelerate(pipe, client=client):
        forward = vars(pipe.transformer)["forward"]
        calls: list[int] = []

        def kill_after_the_first(module: Any, args: Any, result: Any) -> None:
            calls.append(1)
            if len(calls) == 1:
                pid = client.status().workers[0].pid
                os.kill(pid, signal.SIGKILL)
                until(lambda: pid not in {each.pid for each in client.status().workers}, "the worker to end")
                client.wait_ready(120)

        hook = pipe.transformer.register_forward_hook(kill_after_the_first)
        with pytest.raises(LeaseLost, match="new cache"):
            entry.run(pipe)
        hook.remove()
        assert vars(pipe.transformer)["forward"] is forward
        assert same(entry.run(pipe), expected)
